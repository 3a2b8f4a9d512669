"""Guesses: what is guessed, how long, what it may cost, and that it changes no choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from phirt.errors import UnsupportedParameterError
from phirt.generation.draft_model import ModelDrafter
from phirt.generation.history import TokenHistory
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.prefix import PrefixCache
from phirt.generation.prompt_lookup import PromptLookup
from phirt.generation.speculation import Draft, Speculation, StepCosts
from tests.fakes import FakeModel, FakeSession, counting, scripted

VOCAB = 12


def history_of(*ids: int) -> TokenHistory:
    return TokenHistory(ids, vocab_size=100)


def mixing(ids):
    """Logits that depend on the last three tokens, so that stretches come again."""
    seed = 0
    for token in ids[-3:]:
        seed = (seed * 31 + token + 1) % 2**31
    return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)


def loop_of(model, prompt, *, drafter=None, costs=None, prefixes=None, **params) -> DecodeLoop:
    chosen = GenerationParams(**{"max_new_tokens": 60, "temperature": 0, **params})
    return DecodeLoop(
        model,
        prompt,
        chosen,
        defaults=GenerationDefaults(),
        drafter=drafter,
        step_costs=costs,
        prefixes=prefixes,
    )


def cheap() -> StepCosts:
    """Several tokens at once cost hardly more than one."""
    costs = StepCosts()
    for _ in range(50):
        costs.decoded(1.0)
        costs.verified(9, 1.05)
    return costs


class Always:
    """The same guess whatever came before."""

    def __init__(self, *ids, chance=0.99):
        self.ids, self.chance, self.closed = ids, chance, 0

    def propose(self, history, most):
        return Draft(self.ids[:most], chance=self.chance)

    def close(self):
        self.closed += 1


class TestPromptLookup:
    def test_what_followed_the_last_tokens_before(self):
        draft = PromptLookup().propose(history_of(1, 2, 3, 4, 5, 1, 2), 3)
        assert list(draft.token_ids) == [3, 4, 5]

    def test_nothing_new_is_guessed_of_nothing_known(self):
        lookup = PromptLookup()
        assert not lookup.propose(history_of(7), 3).token_ids
        assert not lookup.propose(history_of(1, 2), 3).token_ids
        assert not lookup.propose(history_of(1, 2, 3, 4), 3).token_ids

    def test_of_two_places_the_one_that_agrees_longer(self):
        draft = PromptLookup().propose(history_of(9, 1, 2, 50, 8, 1, 2, 60, 9, 1, 2), 1)
        assert list(draft.token_ids) == [50]

    def test_of_two_that_agree_alike_the_later_one(self):
        draft = PromptLookup().propose(history_of(1, 2, 50, 1, 2, 60, 1, 2), 1)
        assert list(draft.token_ids) == [60]

    def test_the_longer_the_match_the_better_the_chance(self):
        short = PromptLookup().propose(history_of(1, 2, 3, 9, 1, 2), 1)
        run = list(range(20, 40))
        long = PromptLookup().propose(history_of(*run, 5, *run), 1)
        assert list(long.token_ids) == [5]
        assert long.chance > short.chance
        assert long.kind != short.kind

    def test_it_follows_a_text_that_grows(self):
        lookup, history = PromptLookup(), history_of(1, 2, 3)
        for token in (4, 1, 2):
            lookup.propose(history, 4)
            history.append(token)
        assert list(lookup.propose(history, 4).token_ids) == [3, 4, 1, 2]


class TestChoicesStayTheSame:
    @pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
    @pytest.mark.parametrize("seed", range(6))
    def test_token_by_token(self, temperature, seed):
        model = FakeModel(mixing, vocab=VOCAB, context_length=200)
        params = {"temperature": temperature, "seed": seed, "repetition_penalty": 1.1}
        plain = loop_of(model, [1, 2, 3], **params)
        expected = [step.token_id for step in plain]
        for drafter in (None, Always(3), Always(*range(8)), ModelDrafter(model)):
            guessing = loop_of(
                model,
                [1, 2, 3],
                drafter=drafter,
                costs=cheap(),
                prompt_lookup_num_tokens=8,
                **params,
            )
            assert [step.token_id for step in guessing] == expected
            assert guessing.usage.drafted_tokens > 0
            assert 0 <= guessing.usage.accepted_tokens <= guessing.usage.drafted_tokens
        assert model.sessions_open == 0

    def test_the_distribution_is_that_of_the_target(self):
        """Chi-squared over the second token, which a guess precedes, of 2,000 requests."""
        model = FakeModel(mixing, vocab=VOCAB, context_length=64)
        drafter, costs = Always(4, 4), cheap()
        counts = np.zeros((VOCAB, VOCAB))
        for seed in range(2000):
            loop = loop_of(
                model,
                [1, 2, 3],
                drafter=drafter,
                costs=costs,
                temperature=1.0,
                seed=seed,
                max_new_tokens=3,
            )
            first, second, _ = (step.token_id for step in loop)
            counts[first, second] += 1

        def chances(ids):
            weights = np.exp(mixing(ids).astype(np.float64))
            return weights / weights.sum()

        expected = np.stack(
            [chances([1, 2, 3])[first] * chances([1, 2, 3, first]) for first in range(VOCAB)]
        )
        expected *= counts.sum()
        often = expected >= 5
        statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
        freedom = int(often.sum()) - 1
        # Wilson and Hilferty's approximation of the quantile at 1e-4, which is 3.72 deviations.
        bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3
        assert statistic < bound

    def test_a_limit_a_stop_token_and_the_context_end_it_where_they_did(self):
        model = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=40, eos=[9])
        right = Always(*range(4, 9), 9, 10, 11)
        for params, reason in (
            ({"max_new_tokens": 4}, "length"),
            ({"max_new_tokens": None}, "stop"),
            ({"max_new_tokens": None, "ignore_eos": True}, "context"),
        ):
            plain = loop_of(model, [1, 2, 3], **params)
            guessing = loop_of(model, [1, 2, 3], drafter=right, costs=cheap(), **params)
            assert [s.token_id for s in guessing] == [s.token_id for s in plain]
            assert guessing.finish_reason == plain.finish_reason == reason

    def test_across_the_rotary_boundary(self):
        model = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=100, rope_boundary=16)
        plain = loop_of(model, [1, 2, 3])
        guessing = loop_of(model, [1, 2, 3], drafter=ModelDrafter(model), costs=cheap())
        assert [s.token_id for s in guessing] == [s.token_id for s in plain]


class TestCalls:
    def test_guesses_that_hold_save_calls(self):
        model = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=200)
        loop = loop_of(
            model,
            [*range(VOCAB), 0, 1, 2],
            costs=cheap(),
            prompt_lookup_num_tokens=8,
            max_new_tokens=41,
        )
        list(loop)
        assert len(model.calls) < 10
        assert loop.usage.accepted_tokens >= 34

    def test_what_did_not_hold_is_taken_out_of_the_session(self):
        model = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=200)
        loop = loop_of(model, [1, 2, 3], drafter=Always(0, 0, 0), costs=cheap())
        loop.step(), loop.step()
        assert ("verify", 4) in model.calls
        assert [step.token_id for step in loop][:3] == [6, 7, 8]

    def test_a_kept_session_holds_no_guesses(self):
        model = FakeModel(scripted(VOCAB, 20, [5] * 50), vocab=VOCAB, context_length=200)
        cache = PrefixCache(capacity_bytes=10**6, bytes_per_token=1)
        prompt = [1] * 20
        loop = loop_of(
            model,
            prompt,
            drafter=Always(5, 6, 7),
            costs=cheap(),
            prefixes=cache,
            max_new_tokens=30,
            stop_token_ids=[9],
        )
        loop.step(), loop.step()
        loop.cancel()
        loop.step()
        taken = cache.take(model, np.array([*prompt, *loop.generated_ids, 3, 3]), limit=200)
        assert taken is not None
        assert isinstance(taken.session, FakeSession)
        assert taken.session.ids == [*prompt, *loop.generated_ids][: taken.session.length]

    def test_guesses_can_begin_and_end_between_two_tokens(self):
        model = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=200)
        loop = loop_of(model, [*range(VOCAB), 0, 1, 2], costs=cheap(), max_new_tokens=40)
        ids = [step.token_id for step in itertools.islice(loop, 5)]
        assert loop.usage.drafted_tokens == 0
        loop.params = loop.params.merge(prompt_lookup_num_tokens=6)
        ids += [step.token_id for step in itertools.islice(loop, 9)]
        assert loop.usage.drafted_tokens > 0
        loop.params = loop.params.merge(prompt_lookup_num_tokens=None)
        model.calls.clear()
        ids += [step.token_id for step in loop]
        assert ids == [(3 + index) % VOCAB for index in range(40)]
        assert {kind for kind, _ in model.calls} == {"run"}

    def test_the_drafter_is_closed_with_the_request(self):
        drafter = Always(1)
        model = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=200)
        list(loop_of(model, [1], drafter=drafter, max_new_tokens=3))
        assert drafter.closed

    def test_a_model_that_cannot_judge_guesses_says_so(self):
        model = FakeModel(vocab=VOCAB, verify=False)
        with pytest.raises(UnsupportedParameterError, match="a fake needs none"):
            loop_of(model, [1], prompt_lookup_num_tokens=3)


class TestDraftModel:
    def test_it_runs_only_what_is_new(self):
        draft = FakeModel(counting(100), vocab=100, context_length=200)
        drafter, history = ModelDrafter(draft), history_of(1, 2, 3)
        assert list(drafter.propose(history, 3).token_ids) == [4, 5, 6]
        for token in (4, 5, 50):
            history.append(token)
        draft.calls.clear()
        assert list(drafter.propose(history, 2).token_ids) == [51, 52]
        assert draft.calls == [("run", 1), ("run", 1)]
        drafter.close()
        assert draft.sessions_open == 0

    def test_at_the_end_of_its_context_it_guesses_nothing(self):
        draft = FakeModel(counting(100), vocab=100, context_length=5)
        drafter, history = ModelDrafter(draft), history_of(1, 2, 3)
        assert list(drafter.propose(history, 8).token_ids) == [4, 5]
        history.append(4)
        history.append(5)
        assert not drafter.propose(history, 8).token_ids

    def test_where_it_fails_the_target_goes_on_alone(self):
        draft = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=200, fail_at=4)
        model = FakeModel(counting(VOCAB), vocab=VOCAB, context_length=200)
        loop = loop_of(model, [1, 2], drafter=ModelDrafter(draft), costs=cheap())
        assert [s.token_id for s in loop] == [(3 + index) % VOCAB for index in range(60)]
        assert draft.sessions_open == 0


class TestLedger:
    @pytest.mark.parametrize("slope", [0.05, 0.3, 0.7])
    @pytest.mark.parametrize("tokens", [128, 1000])
    def test_text_that_no_guess_fits_costs_at_most_three_percent(self, slope, tokens):
        speculation = Speculation(Always(*range(50, 66), chance=0.9), StepCosts(), most=16)
        history, clock = history_of(1, 2), 0.0
        for _ in range(tokens):
            draft = speculation.draft(history, room=100)
            seconds = 1.0 if draft is None else 1 + slope * len(draft.token_ids)
            clock += seconds
            if draft is None:
                speculation.decoded(seconds)
            else:
                rows = np.zeros((len(draft.token_ids) + 1, 100), np.float32)
                speculation.verified(draft, rows, start=len(history), seconds=seconds)
            history.append(3)
            speculation.drop(history, 0)
        assert speculation.drafted_tokens > 0
        assert clock <= 1.03 * tokens

    def test_guesses_grow_with_what_holds_and_with_what_they_cost(self):
        lengths = {}
        for slope in (0.05, 0.4, 0.9):
            costs = StepCosts()
            for _ in range(50):
                costs.decoded(1.0)
                costs.verified(5, 1 + 4 * slope)
            speculation = Speculation(Always(*range(16), chance=0.9), costs, most=16)
            draft = speculation.draft(history_of(1), room=100)
            lengths[slope] = 0 if draft is None else len(draft.token_ids)
        assert lengths[0.05] > lengths[0.4] > lengths[0.9] == 0

    def test_nothing_is_guessed_before_a_step_was_timed(self):
        speculation = Speculation(Always(1, 2), StepCosts(), most=4)
        assert speculation.draft(history_of(1), room=10) is None
        speculation.decoded(1.0)
        assert speculation.draft(history_of(1), room=10) is not None
        assert speculation.draft(history_of(1), room=0) is None
