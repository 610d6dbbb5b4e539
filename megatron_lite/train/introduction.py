"""Start-up log: prints the model, layout, data, loaded checkpoint and save schedule before the first iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_lite.backend.base import Backend
from megatron_lite.config.run import RunConfig
from megatron_lite.config.selection import select_parameters
from megatron_lite.config.sharing import describe_sharing
from megatron_lite.config.tuning import write_factors
from megatron_lite.data.order.set_plan import SetPlan, describe_set
from megatron_lite.data.serving.loader import Loader
from megatron_lite.formatting import format_count, format_size
from megatron_lite.planner.summary import Layout, Length, Memory, ModelSize, summarize
from megatron_lite.runs.metrics_file import metrics_path
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.batches import RunData
from megatron_lite.train.start import Start

SOURCES_SHOWN = 4


def introduction(
    config: RunConfig,
    backend: Backend,
    data: RunData,
    start: Start,
    progress: Progress,
    kernels: Sequence[str],
) -> str:
    """Return the summary, one labelled line per subject; `kernels`: which computes which function."""
    summary = summarize(config)
    lines = [
        ("model", _model(config, summary.model)),
        ("machine", _machine(config, backend, summary.layout)),
        *((("device", "; ".join(settings)),) if (settings := backend.settings()) else ()),
        *(("kernels", text) for text in kernels),
        *_trained(config),
        *((("memory", _memory(summary.memory)),) if backend.asynchronous else ()),
        ("batch", _batch(config)),
        ("length", _length(config, summary.length)),
        *_data(config, data),
        ("start", _start(config, start, progress)),
        ("saves", _saves(config)),
    ]
    return "\n".join(f"  {name:<11} {text}" for name, text in lines)


def _model(config: RunConfig, size: ModelSize) -> str:
    model = config.model
    vocabulary = f"{model.vocab_size:,}"
    if model.padded_vocab_size != model.vocab_size:
        vocabulary += f" (padded to {model.padded_vocab_size:,})"
    embedding = f" (embedding {model.embedding_size:,})" if model.embedding_size else ""
    return (
        f"{size.exact:,} parameters ({size.name}): {model.num_layers} layers{describe_sharing(model)}, "
        f"hidden size {model.hidden_size:,}{embedding}, {model.num_attention_heads} heads, vocabulary {vocabulary}"
    )


def _machine(config: RunConfig, backend: Backend, sizes: Layout) -> str:
    parallel = config.parallel
    text = f"{backend.device_name()}, {config.precision.dtype}"
    if config.fp8.format != "off":
        emulated = "" if backend.name == "cuda" else ", emulated"
        text += f" with fp8 products ({config.fp8.format}, {config.fp8.recipe}{emulated})"
    if config.runtime.compile != "off":
        text += f", compiled by {config.runtime.compile} (in the first iteration, which takes a while)"
    if config.runtime.engine == "deepspeed":
        text += f", DeepSpeed ZeRO stage {config.deepspeed.stage}{_offloading(config)}"
    if parallel.world_size == 1:
        return text
    zero = ", optimizer split over replicas" if parallel.distributed_optimizer else ""
    schedule = f", {parallel.pipeline_schedule}" if parallel.pp > 1 else ""
    return f"{parallel.world_size} ranks ({sizes.axes}{schedule}{zero}), each {text}"


def _offloading(config: RunConfig) -> str:
    """Return the state that DeepSpeed offloads, and where to."""
    names = {"optimizer": "optimizer state", "param": "parameters"}
    places = {"cpu": "in CPU memory", "nvme": "on NVMe"}
    devices = {part: config.deepspeed.offload_device(part) for part in names}
    return "".join(f", {names[part]} {places[device]}" for part, device in devices.items() if device != "none")


def _trained(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield a line about frozen parameters and learning-rate factors, if there are any."""
    chosen = select_parameters(config)
    if chosen.frozen:
        yield (
            "frozen",
            f"{chosen.num_frozen:,} of {chosen.num_elements:,} parameters, in {len(chosen.frozen)} tensors (--freeze)",
        )
    if chosen.factors:
        factors = " ".join(write_factors(config.tuning.lr_factors))
        yield "factors", f"of the learning rate for {len(chosen.factors)} tensors (--lr-factors {factors})"


def _memory(memory: Memory) -> str:
    """Return the plan of a device's memory; on a CPU other kernels and the host's memory would change it."""
    fullest = max(memory.ranks, key=lambda rank: rank.total)
    where = f" of pipeline rank {fullest.pp_rank}" if len(memory.ranks) > 1 else ""
    return (
        f"{format_size(fullest.total)} planned for the tensors{where}: {format_size(fullest.model_state)} of weights, "
        f"gradients and optimizer state, {format_size(fullest.working)} of activations and others"
    )


def _batch(config: RunConfig) -> str:
    batch = config.batch
    final = final_batch_size(batch, config.parallel.dp)
    text = f"{final:,} samples of {batch.seq_length:,} tokens an iteration ({final * batch.seq_length:,} tokens)"
    text += f", micro-batches of {batch.micro_batch_size}"
    if batch.rampup is not None:
        text += (
            f", from {batch.rampup.start} in steps of {batch.rampup.increment} over {batch.rampup.samples:,} samples"
        )
    return text


def _length(config: RunConfig, length: Length) -> str:
    lr = config.lr
    warmup = f", {length.warmup:,.0f} {length.lr_unit} of warm-up" if length.warmup else ""
    end = f" to {lr.min_lr:g}, {lr.style}" if lr.style != "constant" else ", constant"
    tuning = config.tuning
    epochs = (
        f"{format_count(tuning.epochs, 'epoch')} of {format_count(config.epoch_samples, 'sample')}: "
        if tuning.epochs
        else ""
    )
    return (
        f"{epochs}{length.iterations:,} iterations, {length.samples:,} samples, {length.tokens:,} tokens; "
        f"learning rate {config.optimizer.relative_step or f'{lr.lr:g}{end}{warmup}'}"
    )


def _data(config: RunConfig, data: RunData) -> Iterator[tuple[str, str]]:
    if data.train is not None and data.train_plan is not None:
        yield "train", _sources(data.train, data.train_plan)
    training = config.training
    often = (
        f"every {training.eval_interval:,} iterations and at the end" if training.eval_interval else "only at the end"
    )
    for split, key, loaders, when in (
        ("validation", "valid", data.valid, often),
        ("test", "test", data.test, "at the end"),
    ):
        for name, loader in loaders.items():
            yield (
                split,
                f"{f'{name}: ' if len(loaders) > 1 else ''}{_sources(loader, data.plans[key][name])}"
                + ("" if training.skip_train else f", {when}"),
            )


def _sources(loader: Loader, plan: SetPlan) -> str:
    return describe_set(plan, loader.names, SOURCES_SHOWN)


def _start(config: RunConfig, start: Start, progress: Progress) -> str:
    if start.path is None:
        return f"fresh weights, seed {config.runtime.seed}"
    if config.checkpoint.finetune or config.checkpoint.reset_progress:
        taken = "weights" if config.checkpoint.finetune else "weights and optimizer state"
        return f"iteration 0, with the {taken} of {start.path}"
    return f"after iteration {progress.iteration:,}, from {start.path}"


def _saves(config: RunConfig) -> str:
    options, metrics = config.checkpoint, metrics_path(config)
    if config.training.skip_train:
        return "none under --skip-train"
    if not options.save:
        text = "none, for there is no --save"
    else:
        every = [
            f"every {phase.interval:,} iterations" + (f" until {phase.until:,}" if phase.until else "")
            for phase in options.phases
        ]
        text = f"{options.save}, {', then '.join(every)}{' and ' if every else ''}at the end"
    return text if metrics is None else f"{text}; every number in {metrics}"
