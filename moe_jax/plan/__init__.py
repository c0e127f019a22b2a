"""Plans of train steps on slices of TPU pods: memory, time and cost, without a TPU."""
