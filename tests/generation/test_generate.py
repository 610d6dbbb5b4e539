import dataclasses

import pytest
import torch

from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.partition import stage_layers
from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.generation.generate import generate
from megatron_lite.generation.requests import Context, Request
from megatron_lite.generation.sampling import Sampling, choose, penalize
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3], [7, 1, 4, 9, 2], [5, 5, 5], [11, 12, 13, 14, 15, 16, 17, 18]]
SEEDS = [10, 11, 12, 13]
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature": Sampling(temperature=1.3),
    "top": Sampling(top_k=5, top_p=0.9, min_p=0.05),
    "penalty": Sampling(repetition_penalty=1.5, temperature=0.7),
    "greedy penalty": Sampling(temperature=0.0, repetition_penalty=1.5),
}
SHAPES = {
    "gpt2": {},
    "llama": {
        "position_embedding": "rotary",
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "num_query_groups": 2,
        "linear_bias": False,
        "tied_embeddings": False,
    },
    "bloom": {"position_embedding": "alibi", "embed_layernorm": True},
}


def run(stage, prompts, count, sampling, seeds, *, context=None, eod=None, **options):
    """Return what is generated for each prompt, in the order of the prompts."""
    requests = [
        Request(prompt=prompt, max_new_tokens=count, sampling=sampling, seed=seed, name=f"Prompt {number}")
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True), 1)
    ]
    found = dict(generate(stage, requests, context=context or Context(32), eod=eod, **options))
    return [found[number] for number in range(len(prompts))]


def tokens_of(*args, **options):
    return [one.tokens for one in run(*args, **options)]


@torch.no_grad()
def without_cache(stage, prompt, count, sampling, seed, eod=None, window=lambda tokens: tokens):
    """Generate without cache: the window passes through the model for every token; return tokens, log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    tokens, new, log_probs = list(prompt), [], []
    stage.eval()
    while len(new) < count:
        row = torch.tensor([window(tokens)])
        logits = stage.logits(None, MicroBatch(tokens=row, labels=row))[-1, :, : stage.config.vocab_size]
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        changed = penalize(logits[0], tokens, sampling.repetition_penalty).unsqueeze(0)
        token = int(choose(changed, sampling, stage.config.vocab_size, uniform))
        if token == eod:
            break
        tokens.append(token)
        new.append(token)
        log_probs.append(float(logits[0].double().log_softmax(-1)[token]))
    return new, log_probs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_batch_with_cache_equals_single_prompts_without_cache(make_stage, shape, sampling, batch_size):
    stage = make_stage(**SHAPES[shape])
    found = run(stage, PROMPTS, 12, sampling, SEEDS, batch_size=batch_size)
    wanted = [without_cache(stage, prompt, 12, sampling, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert [one.tokens for one in found] == [tokens for tokens, _ in wanted]
    for one, (_, log_probs) in zip(found, wanted, strict=True):
        assert one.log_probs == pytest.approx(log_probs, rel=1e-4, abs=1e-4)
        assert one.log_prob == pytest.approx(sum(log_probs), rel=1e-4)
    assert len({tuple(one.tokens) for one in found}) == 4  # not one constant that would prove nothing


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("length", "step"), [(8, 4), (5, 1), (6, 6)])
def test_a_sliding_window_equals_the_window_without_cache(make_stage, shape, sampling, length, step):
    stage, context = make_stage(**SHAPES[shape]), Context(length, step)
    prompts = [*PROMPTS, list(range(20))]  # prompts longer than the context, too

    def window(tokens):
        while len(tokens) > length:
            tokens = tokens[step:]
        return tokens

    found = tokens_of(stage, prompts, 15, sampling, [*SEEDS, 14], context=context, batch_size=3)
    for row, prompt, seed in zip(found, prompts, [*SEEDS, 14], strict=True):
        assert row == without_cache(stage, prompt, 15, sampling, seed, window=window)[0]


def test_a_finished_text_makes_room_for_the_next(stage, monkeypatch):
    passes = []
    inner = stage.new_cache
    monkeypatch.setattr(stage, "new_cache", lambda rows, length: passes.append((rows, length)) or inner(rows, length))
    prompts = PROMPTS * 3
    found = tokens_of(stage, prompts, 4, GREEDY, range(12), batch_size=2)
    assert passes == [(2, 12)]
    assert found == tokens_of(stage, PROMPTS, 4, GREEDY, SEEDS) * 3


def test_each_text_ends_at_its_own_end_of_document(stage):
    sampling = Sampling(temperature=2.0)
    free = tokens_of(stage, PROMPTS, 20, sampling, [1, 2, 3, 4])
    eod = free[1][4]
    found = run(stage, PROMPTS, 20, sampling, [1, 2, 3, 4], eod=eod)
    assert [one.tokens for one in found] == [row[: row.index(eod)] if eod in row else row for row in free]
    assert [one.reason for one in found] == ["eod" if eod in row else "length" for row in free]
    for one, whole in zip(found, run(stage, PROMPTS, 20, sampling, [1, 2, 3, 4]), strict=True):
        counted = whole.log_probs[: len(one.tokens) + 1]
        assert one.log_prob == pytest.approx(sum(counted), rel=1e-4)
        assert one.mean_log_prob == pytest.approx(sum(counted) / len(counted), rel=1e-4)
    assert len({len(one.tokens) for one in found}) > 1


def test_greedy_is_deterministic_and_sampling_depends_on_seeds(stage):
    def once(sampling, seed):
        return tokens_of(stage, [[3, 4]], 16, sampling, [seed])

    assert once(GREEDY, 1) == once(GREEDY, 2)
    warm = Sampling(temperature=1.5)
    assert once(warm, 1) == once(warm, 1) != once(warm, 2)


def test_each_request_has_its_own_sampling_and_length(stage):
    requests = [
        Request(prompt=PROMPTS[1], max_new_tokens=count, sampling=sampling, seed=7)
        for count, sampling in ((3, GREEDY), (0, GREEDY), (9, Sampling(temperature=1.3)), (5, Sampling(top_k=2)))
    ]
    found = dict(generate(stage, requests, context=Context(32)))
    for number, request in enumerate(requests):
        alone = tokens_of(stage, [request.prompt], request.max_new_tokens, request.sampling, [7])[0]
        assert found[number].tokens == alone and len(alone) == request.max_new_tokens


def test_padding_is_never_generated(make_stage):
    stage = make_stage(vocab_size=3)
    hot = Sampling(temperature=100.0)
    rows = tokens_of(stage, [[0], [1]], 31, hot, [1, 2])
    assert set(rows[0]) | set(rows[1]) == {0, 1, 2}


def test_on_token_is_called_for_each_token_and_can_end_a_text(stage):
    told = []

    def on_token(row, token):
        told.append((row, token))
        return row == 1 and len(told) > 5

    found = run(stage, PROMPTS[:2], 5, GREEDY, [1, 1], on_token=on_token)
    for row in range(2):
        assert [token for at, token in told if at == row] == found[row].tokens
    assert [(len(one.tokens), one.reason) for one in found] == [(5, "length"), (3, "stop")]


def test_an_interruption_ends_all_texts(stage):
    calls = iter([False, False, True])
    found = dict(
        generate(
            stage,
            [Request(prompt=prompt, max_new_tokens=9, sampling=GREEDY) for prompt in PROMPTS],
            context=Context(32),
            batch_size=3,
            interrupted=lambda: next(calls),
        )
    )
    ends = {number: (len(one.tokens), one.reason) for number, one in found.items()}
    assert ends == dict.fromkeys(range(3), (2, "interrupted"))


def test_training_mode_and_gradients_do_not_change(stage):
    stage.train()
    run(stage, [[1]], 2, GREEDY, [0])
    assert stage.training
    assert all(parameter.grad is None for parameter in stage.parameters())
    with pytest.raises(RuntimeError, match="stop"):
        run(stage, [[1]], 2, GREEDY, [0], on_token=stop)
    assert stage.training


def stop(row, token):
    raise RuntimeError("stop")


def test_no_prompts_and_no_tokens(stage):
    assert tokens_of(stage, [], 5, GREEDY, []) == []
    assert tokens_of(stage, [[1], [2]], 0, GREEDY, [1, 2]) == [[], []]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("gpt2", r"32 learned positions\. Use --max-new-tokens 12 or less, or add --sliding-window to drop"),
        (
            "bloom",
            r"32 tokens\. Use --max-new-tokens 12 or less, or add --context 33 to extrapolate, or add --sliding-window",
        ),
    ],
)
def test_the_last_position_can_be_used_and_no_more(make_stage, shape, message):
    stage = make_stage(**SHAPES[shape])
    assert len(tokens_of(stage, [[1] * 20], 12, GREEDY, [0])[0]) == 12
    with pytest.raises(ConfigError, match=message):
        run(stage, [[1] * 20], 13, GREEDY, [0])


def test_a_prompt_longer_than_the_context_is_refused(stage):
    with pytest.raises(
        ConfigError,
        match=r"Prompt 2 of 33 tokens and at least 1 new .* Shorten the prompt to 31 tokens, or add --sliding-window",
    ):
        run(stage, [[1], [1] * 33], 1, GREEDY, [0, 0])


@pytest.mark.parametrize(("prompt", "args"), [([], "has no tokens"), ([51], "vocabulary"), ([-1], "vocabulary")])
def test_invalid_prompts_are_refused(stage, prompt, args):
    with pytest.raises(ConfigError, match=f"Prompt 2 .*{args}"):
        run(stage, [[1], prompt], 1, GREEDY, [0, 0])


def test_non_finite_logits_are_an_error(make_stage):
    stage = make_stage()
    with torch.no_grad():
        stage.decoder.final_norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="finite"):
        run(stage, [[1]], 1, GREEDY, [0])


def on_rank(backend, config, sampling, context):
    """Return tokens and log-probabilities of all prompts, on every rank of a layout."""
    mesh = build_mesh(backend, config.parallel)
    layers = stage_layers(config.model, config.parallel)[mesh.pp.rank]
    stage = GPTStage(config, layers, mesh, RngStreams(1, backend, mesh.tp.rank))
    found = run(stage, PROMPTS, 12, sampling, SEEDS, context=context, pp=mesh.pp, batch_size=3)
    return [(one.tokens, one.log_probs) for one in found]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("shape", ["llama", "bloom"])
def test_every_layout_generates_the_same(on_ranks, make_config, make_stage, shape, tp, pp):
    parallel = ParallelConfig(world_size=tp * pp, tp=tp, pp=pp)
    config = dataclasses.replace(make_config(**SHAPES[shape]), parallel=parallel)
    sampling, context = Sampling(temperature=1.3, repetition_penalty=1.2), Context(10, 5)
    wanted = run(make_stage(**SHAPES[shape]), PROMPTS, 12, sampling, SEEDS, context=context)
    for of_rank in on_ranks(tp * pp, on_rank, config, sampling, context):
        assert [tokens for tokens, _ in of_rank] == [one.tokens for one in wanted]
        for (_, log_probs), one in zip(of_rank, wanted, strict=True):
            assert log_probs == pytest.approx(one.log_probs, rel=1e-4, abs=1e-4)
