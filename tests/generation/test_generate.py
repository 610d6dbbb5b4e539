import pytest
import torch

from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.generation.generate import generate
from megatron_lite.generation.sampling import Sampling, choose
from megatron_lite.model.batch import MicroBatch

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3], [7, 1, 4, 9, 2], [5, 5, 5], [11, 12, 13, 14, 15, 16, 17, 18]]

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


def without_cache(stage, prompt, count, sampling, seed, eod=None):
    """Generate without cache: the whole text passes through the model for every token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, new = list(prompt), []
    stage.eval()
    with torch.no_grad():
        while len(new) < count:
            row = torch.tensor([tokens])
            logits = stage.logits(None, MicroBatch(tokens=row, labels=row))[-1]
            uniform = torch.rand(1, generator=generator, dtype=torch.float64)
            token = int(choose(logits, sampling, stage.config.vocab_size, uniform))
            if token == eod:
                break
            tokens.append(token)
            new.append(token)
    return new


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.3), Sampling(top_k=5, top_p=0.9)])
def test_a_batch_with_cache_equals_single_prompts_without_cache(make_stage, shape, sampling):
    stage = make_stage(**SHAPES[shape])
    seeds = [10, 11, 12, 13]
    found = generate(stage, PROMPTS, max_new_tokens=12, sampling=sampling, seeds=seeds, eod=None)
    wanted = [
        without_cache(stage, *row, sampling, seed) for row, seed in zip(((p, 12) for p in PROMPTS), seeds, strict=True)
    ]
    assert found == wanted
    assert len({tuple(row) for row in found}) == 4  # not one constant that would prove nothing


def test_each_row_ends_at_its_own_end_of_document(stage):
    sampling = Sampling(temperature=2.0)
    free = generate(stage, PROMPTS, max_new_tokens=20, sampling=sampling, seeds=[1, 2, 3, 4], eod=None)
    eod = free[1][4]
    found = generate(stage, PROMPTS, max_new_tokens=20, sampling=sampling, seeds=[1, 2, 3, 4], eod=eod)
    assert found == [row[: row.index(eod)] if eod in row else row for row in free]
    assert len({len(row) for row in found}) > 1


def test_greedy_is_deterministic_and_sampling_depends_on_seeds(stage):
    def once(sampling, seed):
        return generate(stage, [[3, 4]], max_new_tokens=16, sampling=sampling, seeds=[seed], eod=None)

    assert once(GREEDY, 1) == once(GREEDY, 2)
    warm = Sampling(temperature=1.5)
    assert once(warm, 1) == once(warm, 1) != once(warm, 2)


def test_padding_is_never_generated(make_stage):
    stage = make_stage(vocab_size=3)
    hot = Sampling(temperature=100.0)
    rows = generate(stage, [[0], [1]], max_new_tokens=31, sampling=hot, seeds=[1, 2], eod=None)
    assert set(rows[0]) | set(rows[1]) == {0, 1, 2}


def test_on_token_is_called_for_each_token(stage):
    told = []
    found = generate(
        stage,
        PROMPTS[:2],
        max_new_tokens=5,
        sampling=GREEDY,
        seeds=[1, 1],
        eod=None,
        on_token=lambda row, token: told.append((row, token)),
    )
    for row in range(2):
        assert [token for at, token in told if at == row] == found[row]
    # The first prompt is shorter: it has four tokens before the second has one.
    assert [row for row, _ in told[:4]] == [0, 0, 0, 0]


def test_training_mode_and_gradients_do_not_change(stage):
    stage.train()
    generate(stage, [[1]], max_new_tokens=2, sampling=GREEDY, seeds=[0], eod=None)
    assert stage.training
    assert all(parameter.grad is None for parameter in stage.parameters())
    with pytest.raises(RuntimeError, match="stop"):
        generate(stage, [[1]], max_new_tokens=2, sampling=GREEDY, seeds=[0], eod=None, on_token=stop)
    assert stage.training


def stop(row, token):
    raise RuntimeError("stop")


def test_no_prompts_and_no_tokens(stage):
    assert generate(stage, [], max_new_tokens=5, sampling=GREEDY, seeds=[], eod=None) == []
    assert generate(stage, [[1], [2]], max_new_tokens=0, sampling=GREEDY, seeds=[1, 2], eod=None) == [[], []]


def test_the_last_position_can_be_used_and_no_more(stage):
    full = generate(stage, [[1] * 20], max_new_tokens=12, sampling=GREEDY, seeds=[0], eod=None)
    assert len(full[0]) == 12
    with pytest.raises(ConfigError, match=r"32 learned positions\. Use --max-new-tokens 12 or less"):
        generate(stage, [[1] * 20], max_new_tokens=13, sampling=GREEDY, seeds=[0], eod=None)


@pytest.mark.parametrize(("prompt", "words"), [([], "has no tokens"), ([51], "vocabulary"), ([-1], "vocabulary")])
def test_invalid_prompts_are_refused(stage, prompt, words):
    with pytest.raises(ConfigError, match=words):
        generate(stage, [[1], prompt], max_new_tokens=1, sampling=GREEDY, seeds=[0, 0], eod=None)


def test_non_finite_logits_are_an_error(make_stage):
    stage = make_stage()
    with torch.no_grad():
        stage.decoder.final_norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="finite"):
        generate(stage, [[1]], max_new_tokens=1, sampling=GREEDY, seeds=[0], eod=None)
