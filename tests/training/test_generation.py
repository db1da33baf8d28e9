"""What our loop writes is what transformers' generate() writes, and a row does not hang on those beside it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from architectures import EOS, VOCAB, make
from torch import Tensor

from srppo.config import ModelConfig, derive_seed
from srppo.models import generation, narrow
from srppo.models.adapters import AdaptedModel, lora_settings
from srppo.models.language_model import LanguageModel
from srppo.models.loading import load_model
from srppo.training import parallel, rollout
from srppo.training.rollout import drawing, generate

NAMES = ("llama", "mistral window", "mixtral", "qwen2 tied", "gemma3 text", "gpt2 positions", "opt projected")
NAMES += ("cohere scale", "deepseek v3", "gpt neox")
LIMIT, STOPS = 12, {EOS, 5, 11, 17, 23, 29, 35}
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(1, VOCAB, (n,), generator=GENERATOR).tolist() for n in (3, 7, 1, 5, 9, 2, 4, 4, 6) * 3]


def written(lm: LanguageModel, prompts: Sequence[Sequence[int]] = PROMPTS, **how: object) -> list[list[int]]:
    settings = {"stop_ids": [*STOPS], "pad_id": EOS, "max_new_tokens": LIMIT, "seed": 3, "temperature": 3.0, **how}
    return generate(lm, prompts, **settings).responses()  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [None, 3.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_transformers(name: str, temperature: float | None) -> None:
    lm = make(name, attention="sdpa")
    assert generation.can_generate(lm)
    ours = written(lm, temperature=temperature)
    lm.packs = False
    assert ours == written(lm, temperature=temperature)
    if temperature is not None:
        assert len({len(row) for row in ours}) >= 5 and len({tuple(row) for row in ours}) > 9
    assert all(not STOPS & {*row[:-1]} for row in ours)


def test_a_row_has_the_same_tokens_in_any_batch() -> None:
    """Alone, in parts, in another order, beside rows that end early or late."""
    lm = make("llama", attention="sdpa")
    whole = written(lm)
    seeds = [derive_seed(3, "row", i) for i in range(len(PROMPTS))]
    for i in (0, 5, 13, 26):
        assert written(lm, [PROMPTS[i]], seed=[seeds[i]]) == [whole[i]]
    assert written(lm, rows=4) == whole
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(1)).tolist()
    assert written(lm, [PROMPTS[i] for i in order], seed=[seeds[i] for i in order]) == [whole[i] for i in order]


def test_a_row_has_the_same_bits_beside_longer_rows() -> None:
    """Of its logits, at each token: a longer row beside it neither adds to its sums nor changes their order."""
    lm = make("llama", attention="sdpa")
    few = [[1 + (i * i + row) % 30 for i in range(30 + 5 * row)] for row in range(generation.LEAST)]
    longer = [1 + i % 30 for i in range(4 * generation.BLOCK)]
    if any(not blas_is_row_wise(each) for each in lm.model.modules() if isinstance(each, torch.nn.Linear)):
        pytest.skip("BLAS rounds a row by the number of rows here")

    def logits(prompts: Sequence[Sequence[int]]) -> dict[tuple[int, int], Tensor]:
        seen = {}

        def draw(logits_BV: Tensor, rows: list[int], steps: list[int]) -> tuple[Tensor, Tensor]:
            at = [*zip(rows, steps, strict=True)]
            seen.update({key: x_V.clone() for key, x_V in zip(at, logits_BV, strict=True)})
            return torch.tensor([1 + (7 * row + step) % 30 for row, step in at]), logits_BV[:, 0]

        generation.generate_packed(lm, prompts, draw, stop_ids=[], max_new_tokens=6, rows=len(prompts))
        return seen

    alone, beside = logits(few), logits([*few, longer])
    assert len(alone) == len(few) * 6 and all(torch.equal(x_V, beside[key]) for key, x_V in alone.items())


def blas_is_row_wise(layer: torch.nn.Linear) -> bool:
    """Whether a row's product has the same bits among few rows and among many."""
    many_ND = torch.randn((400, layer.in_features), generator=torch.Generator().manual_seed(0))
    whole = layer(many_ND)
    return all(torch.equal(layer(many_ND[:n]), whole[:n]) for n in (16, 17, 80, 336))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_by_blocks_is_attention(dtype: torch.dtype) -> None:
    """Against torch's own in fp64, values of another width than keys among it; unseen places may hold anything."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(size, generator=generator).to(dtype) for size in ((5, 3, 2, 8), (5, 3, 192, 8), (5, 3, 192, 6))
    )
    mask = torch.rand((5, 1, 1, 192), generator=generator) < 0.3
    mask[0], mask[1], mask[:, ..., 3] = False, True, True  # one sees a single place, one all
    found = generation.attention_by_blocks(q, k, v, attn_mask=mask, scale=0.7)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=0.7)
    assert found.dtype == dtype
    # Scores of up to 10 are off by some 10 roundings of their own size, and so are weights; the result is rounded once.
    within = 100 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=within)
    seen = mask[:, :, 0, :, None].expand(-1, 3, -1, -1)
    others = generation.attention_by_blocks(
        q, k.where(seen, k.new_tensor(30.0)), v.where(seen, v.new_tensor(-50.0)), attn_mask=mask, scale=0.7
    )
    assert torch.equal(found, others)


@pytest.mark.parametrize("name", ["llama", "mistral window", "deepseek v3"])
def test_equal_prompts_are_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside each other or apart; each row still draws its own tokens, those that it draws where nothing is shared."""
    lm = make(name, attention="sdpa")
    seeds = [derive_seed(3, "row", i) for i in range(5 * len(PROMPTS))]
    apart = [row for i in range(5) for row in written(lm, seed=seeds[i::5])]
    read: list[int] = []
    prefill = generation.Prefill

    def counted(lengths: Sequence[int], *rest: object) -> generation.Prefill:
        read.append(sum(lengths))
        return prefill(lengths, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "Prefill", counted)
    beside = written(lm, [prompt for prompt in PROMPTS for _ in range(5)], seed=seeds)
    assert beside == [apart[i * len(PROMPTS) + k] for k in range(len(PROMPTS)) for i in range(5)]
    assert written(lm, PROMPTS * 5, seed=[seed for i in range(5) for seed in seeds[i::5]]) == apart
    assert read == [sum(map(len, {tuple(prompt) for prompt in PROMPTS}))] * 2
    assert written(lm, [PROMPTS[1]] * 40, seed=seeds[:40])[7] == written(lm, [PROMPTS[1]], seed=seeds[7:8])[0]
    assert read[2] == read[3] == 21 and len(PROMPTS[1]) == 7  # three times, for no pass has fewer than LEAST rows
    pair = [PROMPTS[0], PROMPTS[1]]
    halves = written(lm, [prompt for prompt in pair for _ in range(8)], seed=seeds[:16])
    assert halves == [
        row
        for prompt, own in zip(pair, (seeds[:8], seeds[8:16]), strict=True)
        for seed in own
        for row in written(lm, [prompt], seed=[seed])
    ]
    assert len({tuple(row) for row in beside[:5]}) > 1


def test_rows_that_are_done_leave_and_no_fewer_than_the_least_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama", attention="sdpa")
    sizes: list[int] = []
    step = generation._step

    def counted(lm: LanguageModel, tokens_B: Tensor, *rest: object) -> Tensor:
        sizes.append(len(tokens_B))
        return step(lm, tokens_B, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "_step", counted)
    rows = written(lm)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1] >= generation.LEAST
    for now, size in enumerate(sizes, start=1):
        alive = sum(len(row) > now for row in rows)
        assert size >= max(alive, generation.LEAST) >= generation.KEPT * size
    sizes.clear()
    assert written(lm, PROMPTS[:2]) == rows[:2] and set(sizes) == {generation.LEAST}


def test_where_rows_are_done_others_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has the tokens that it has beside all others, and places stand empty only below KEPT."""
    lm = make("llama", attention="sdpa")
    prompts = [[*row[: 1 + i % len(row)], 1 + i % (VOCAB - 1)] for i, row in enumerate(PROMPTS * 6)]
    whole, alive, read = written(lm, prompts), list[int](), list[int]()
    step, first = generation._step, generation._read

    def stepped(lm: LanguageModel, tokens_B: Tensor, *rest: object) -> Tensor:
        alive.append(len(tokens_B))
        return step(lm, tokens_B, *rest)  # type: ignore[arg-type]

    def begun(lm: LanguageModel, prompts: Sequence[Sequence[int]], *rest: object) -> tuple[Tensor, Tensor]:
        read.append(len(prompts))
        return first(lm, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "_step", stepped)
    monkeypatch.setattr(generation, "_read", begun)
    for size in (4, 16, 40):
        alive.clear(), read.clear()
        assert written(lm, prompts, rows=size) == whole
        most = max(size, generation.LEAST)
        assert read[0] == most and sum(read) == len(prompts) and len(read) > 2
        assert (1 - generation.KEPT) * most < min(read[1:-1]) and max(read[1:]) < most
        assert alive[0] == most and alive == sorted(alive, reverse=True)
        cost = sum(alive)
        parts = [whole[start : start + most] for start in range(0, len(whole), most)]
        assert cost < sum(most * max(map(len, part)) for part in parts)


def test_a_process_without_a_row_writes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer prompts than processes: the others' responses are all there are."""
    seen: list[object] = []

    def gathered(written: dict[int, generation.Written]) -> list[generation.Written]:
        seen.append(written)
        return [([EOS], [0.0])]

    monkeypatch.setattr(parallel, "share", lambda rows: [])
    monkeypatch.setattr(rollout, "together", gathered)
    assert written(make("llama", attention="sdpa"), [[1, 2]]) == [[EOS]] and seen == [{}]


def test_until_ends_rows_and_sees_only_those_that_are_written() -> None:
    lm = make("llama", attention="sdpa")
    shown: list[int] = []

    def twice(responses: list[list[int]]) -> list[bool]:
        shown.append(len(responses))
        return [row.count(row[0]) == 2 for row in responses]

    free, ours = written(lm), written(lm, until=twice)
    assert shown == sorted(shown, reverse=True) and shown[0] == len(PROMPTS)
    assert any(one != other for one, other in zip(free, ours, strict=True))
    for one, other in zip(free, ours, strict=True):
        second = [i for i, token in enumerate(one) if token == one[0]][1:2]
        assert other == one[: second[0] + 1] if second else other == one


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_layers_are_merged_for_generation_and_put_back(
    bf16: bool, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role over narrow weights writes what its merged model writes; bf16 bodies are left as they are."""
    monkeypatch.setattr(narrow, "WORTH", 0)
    make("llama", attention="sdpa").model.bfloat16().save_pretrained(tmp_path)
    base = load_model(str(tmp_path), ModelConfig(base=str(tmp_path), precision="bf16" if bf16 else "fp32"))
    role = AdaptedModel(base, lora_settings(ModelConfig(adapters="lora", lora_rank=4)), seed=1)
    torch.manual_seed(2)
    for weight in role.weights().values():
        weight.data = 0.3 * torch.randn_like(weight)
    before = [type(module).__name__ for module in role.model.modules()]
    with role.merged_layers():
        within = [type(module).__name__ for module in role.model.modules()]
    assert [type(module).__name__ for module in role.model.modules()] == before
    assert ("NarrowLinear" in before) and ("NarrowLinear" in within) == bf16
    if not bf16:
        assert written(role) == written(role.merged()) != written(base)
        with pytest.raises(RuntimeError, match="stopped"), role.merged_layers():
            raise RuntimeError("stopped")
        assert [type(module).__name__ for module in role.model.modules()] == before
        role.recompute_activations()  # memory before time
        with role.merged_layers():
            assert [type(module).__name__ for module in role.model.modules()] == before
    else:
        assert written(role, temperature=None) != written(base, temperature=None)


def test_logits_are_not_rounded_over_a_body_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn from is what the log-probs are taken of: the head's products stay fp32."""
    lm = make("llama", precision="bf16", attention="sdpa")
    seen: list[Tensor] = []
    logits_of = generation._logits

    def kept(model: LanguageModel, hidden_BD: Tensor) -> Tensor:
        seen.append(logits_of(model, hidden_BD))
        exact = hidden_BD.double() @ model.model.lm_head.weight.double().T  # fp64: autocast leaves it
        torch.testing.assert_close(seen[-1].double(), exact, atol=1e-5, rtol=1e-5)
        return seen[-1]

    monkeypatch.setattr(generation, "_logits", kept)
    written(lm, PROMPTS[:16])
    assert seen[0].dtype == torch.float32 and (seen[0] == seen[0].bfloat16().float()).float().mean() < 0.2


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_keys_and_values_are_kept_in_the_precision_that_they_are_computed_in(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[generation.KvCache] = []

    class Kept(generation.KvCache):
        def __init__(self, rows: int, positions: int) -> None:
            super().__init__(rows, positions)
            made.append(self)

    monkeypatch.setattr(generation, "KvCache", Kept)
    written(make("llama", precision=precision, attention="sdpa"), PROMPTS[:16])
    (cache,) = made
    assert {x.dtype for each in cache.by_layer.values() for x in each} == {dtype} and len(cache.by_layer) == 2


def test_draws_follow_the_distribution_and_its_restrictions() -> None:
    """4000 rows of one distribution: top-k and top-p leave what transformers leaves, after the temperature."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    seeds = [derive_seed(0, "test", i) for i in range(4000)]
    rows = list(range(len(seeds)))

    def shares(**how: float) -> Tensor:
        temperature = how.pop("temperature", 1.0)
        draw = drawing(seeds, [temperature] * len(seeds), 3, **how)  # type: ignore[arg-type]
        tokens, logprobs = draw(logits.expand(len(rows), -1), rows, [1] * len(rows))
        found = tokens.bincount(minlength=5) / len(rows)
        for token in tokens.unique().tolist():  # each token's log-prob is one number, and its share is near
            (share,) = logprobs[tokens == token].exp().unique()
            torch.testing.assert_close(share, found[token], atol=4 * 0.5 / 4000**0.5, rtol=0)
        return found

    for found, expected in (
        (shares(), logits.softmax(0)),
        (shares(temperature=2.0), (logits / 2).softmax(0)),
        (shares(top_k=2), torch.tensor([*logits[:2].softmax(0), 0, 0, 0])),
        (shares(top_p=0.8), torch.tensor([*logits[:2].softmax(0), 0, 0, 0])),
        (shares(top_p=0.8, temperature=2.0), torch.tensor([*(logits[:3] / 2).softmax(0), 0, 0])),
    ):
        assert torch.equal(found == 0, expected == 0) or expected.min() < 0.01
        torch.testing.assert_close(found, expected, atol=4 * 0.5 / 4000**0.5, rtol=0)
