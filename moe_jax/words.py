"""Words that other codebases use for fields of a config, and where those fields are here."""

# A field's path, or path=value where the field takes another value than the word does ({} stands for what was given),
# and the words that mean it; case and underscores do not matter.
MEANINGS: dict[str, str] = {
    "model.moe.E": "num_experts n_experts num_local_experts n_routed_experts",
    "model.moe.router": "router_type gate gate_type routing",
    "model.moe.router.K": "top_k num_experts_per_tok num_experts_per_token experts_per_token num_selected_experts K",
    "model.moe.router.normalize": "normalize_weights norm_topk_prob renormalize",
    "model.moe.router.score": "scoring_func score_func gate_function",
    "model.moe.experts.F": "d_ff ffn_dim intermediate_size moe_intermediate_size expert_dim F",
    "model.moe.experts.activation": "activation hidden_act activation_function",
    "model.moe.shared": "shared_expert shared_experts n_shared_experts num_shared_experts",
    "model.moe.dispatch.capacity_factor": "capacity_factor capacity expert_capacity",
    "model.moe.S": "group_size tokens_per_group",
    "model.moe.losses.LoadBalance.weight": "aux_loss aux_loss_coef aux_loss_weight router_aux_loss_coef load_balance",
    "model.moe.losses.RouterZ.weight": "z_loss z_loss_coef z_loss_weight router_z_loss_coef",
    "model.moe.gating=Jitter({})": "jitter jitter_noise jitter_eps router_jitter_noise",
    "model.moe.gating=ExpertDropout({})": "dropout dropout_rate expert_dropout",
    "model.D": "d_model hidden_size hidden_dim embed_dim n_embd dim width",
    "model.N": "num_layers n_layers n_layer num_hidden_layers depth",
    "model.attention.H": "num_heads n_heads n_head num_attention_heads H",
    "model.attention.A": "head_dim d_head d_kv A",
    "model.attention.J": "num_kv_heads n_kv_heads num_key_value_heads J",
    "model.attention.window": "sliding_window window_size attention_window window",
    "model.attention.qk_norm": "qk_norm qk_layernorm",
    "model.attention.position": "position positions position_embedding rope",
    "model.attention.position.base": "rope_theta rope_base rotary_base theta",
    "model.kind": "model_type architecture",
    "model.tied": "tie_word_embeddings tie_embeddings share_embeddings",
    "model.dtype": "precision torch_dtype",
    "model.dtype=bfloat16": "bf16 bfloat16",
    "model.remat=full": "gradient_checkpointing activation_checkpointing",
    "model.patch": "patch_size",
    "data.source": "dataset dataset_name",
    "data.tokenizer=SentencePiece(V={})": "vocab_size vocab vocabulary_size V",
    "data.L": "seq_len max_seq_len seq_length sequence_length context_length block_size max_position_embeddings n_ctx",
    "data.B": "batch_size global_batch_size train_batch_size batch",
    "data.microbatches": "grad_accum grad_accum_steps gradient_accumulation_steps accumulation_steps num_microbatches",
    "optim.schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler",
    "optim.schedule.peak": "lr learning_rate max_lr peak_lr peak",
    "optim.schedule.warmup": "warmup warmup_steps num_warmup_steps",
    "optim.optimizer.weight_decay": "weight_decay wd",
    "optim.optimizer.b1": "beta1 adam_beta1",
    "optim.optimizer.b2": "beta2 adam_beta2",
    "optim.optimizer.eps": "adam_eps adam_epsilon",
    "optim.clip": "grad_clip gradient_clipping max_grad_norm clip_norm",
    "optim.zero1=True": "zero zero_stage",
    "run.steps": "max_steps num_steps train_steps num_train_steps max_iters iterations",
    "run.log_every": "log_interval logging_steps",
    "run.eval_every": "eval_interval eval_steps",
    "run.save_every": "save_interval save_steps checkpoint_every checkpoint_interval",
    "mesh.data": "dp data_parallel data_parallelism",
    "mesh.expert": "ep expert_parallel expert_parallelism expert_parallel_size",
    "mesh.tensor": "tp tensor_parallel tensor_parallelism tensor_parallel_size",
    "seed": "random_seed rng_seed",
}


def _squeezed(word: str) -> str:
    return word.replace("_", "").replace("-", "").lower()


WORDS: dict[str, str] = {_squeezed(word): path for path, several in MEANINGS.items() for word in several.split()}


def meant(name: str) -> str:
    """Returns the path, or path=value, that a word means; "" for a word that means nothing here."""
    return WORDS.get(_squeezed(name), "")


def meant_field(name: str) -> str:
    """Returns the name of the field that a word means, without its path; "" where it means nothing, or a value."""
    path, _, value = meant(name).partition("=")
    return "" if value else path.rpartition(".")[2]
