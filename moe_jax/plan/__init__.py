"""What a train step needs and takes on a slice of a TPU pod, before there is one."""
