"""ReFL through a surrogate: a small network that learns the rewards of the student's latents while training goes on.

1. Rewards without a gradient (text that is spelled right, counted objects, a judge's verdict) get one of ReFL's size.
   TDM-R1 learns a reward likewise; this one is ours, and smaller: convolutions, and attention to the prompt's tokens.
2. It sees x0 at any step of the student, as ReFL does, and is fitted to `samples` of them in each update.
3. Before it is fitted to an update's samples, it predicts their scores. The share of the variance that it explains,
   over the last updates, is its fit on samples that it has not seen, and its weight is multiplied by it. So RL begins
   when the surrogate knows something, and if the student leaves what it knows, RL fades.
4. Scores are learned as standard scores, by a running mean and deviation. ReFL's loss is minus the mean standard score.
5. What predicts, and what the student follows, is a moving average of what is fitted, in small batches: without it the
   fit forgets one update's samples for the next's. On 40 updates of 128 samples of the lab's student, scored by
   lab-conv, it explained .17 of the variance of fresh scores, without it .08.
6. Parameters, average, moments and records are in checkpoints.

M samples of an update on all ranks, m on this one, B states of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from dmdr import distributed, losses
from dmdr.backbones.protocol import Conditioning
from dmdr.config.deal import Deal, share_evenly
from dmdr.config.prompt_record import PromptRecord
from dmdr.config.rl import Surrogate as SurrogateConfig
from dmdr.config.shares import deal_to_rl
from dmdr.optimizers import Trainable
from dmdr.rewards.sources import RewardSources
from dmdr.rl.mixture import Mixture
from dmdr.rl.objective import Figures, Objective, summarize_scores
from dmdr.rollout import Window
from dmdr.shared_base import SharedBase
from dmdr.transfer import send_to
from dmdr.update import Batch, select_states

NAME = "surrogate"  # of its tensors in a checkpoint
CONTEXT = "context"  # what it reads of a conditioning
LARGEST = 16  # side of the grid that attends to the prompt
BETAS, CLIP, BATCH = (0.9, 0.99), 1.0, 32
AVERAGE = 0.99  # decay of the moving average, in each step; from 0 on, as the student's EMA
KEPT = 0.9  # of the running mean and deviation of the scores, in each update


class ScoreNetwork(torch.nn.Module):
    """Latents x0 (B, C, H, W) and their prompts' tokens -> standard scores (B,).

    records: what it remembers, which no optimizer changes: mean and deviation of its scores, of each of the last
    `memory` updates the squared error and the squares about the mean, and the steps done. All 0 at first.
    """

    def __init__(self, channels: int, side: int, tokens: int, config: SurrogateConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[torch.nn.Module] = [torch.nn.Conv2d(channels, width, 3, padding=1)]
        while side > LARGEST:
            layers += [torch.nn.SiLU(), torch.nn.Conv2d(width, width, 3, stride=2, padding=1)]
            side = -(-side // 2)
        layers += [torch.nn.SiLU(), torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.GroupNorm(8, width)]
        self.image = torch.nn.Sequential(*layers)
        self.text = torch.nn.Sequential(torch.nn.LayerNorm(tokens), torch.nn.Linear(tokens, width))
        self.attention = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.mixer = torch.nn.Sequential(
            torch.nn.LayerNorm(2 * width), torch.nn.Linear(2 * width, 2 * width), torch.nn.SiLU()
        )
        self.head = torch.nn.Linear(2 * width, 1)
        lengths = {"moments": 2, "errors": config.memory, "spreads": config.memory, "steps": 1}
        self.records = torch.nn.ParameterDict(
            {
                name: torch.nn.Parameter(torch.zeros(length, dtype=torch.float64), requires_grad=False)
                for name, length in lengths.items()
            }
        )

    def forward(self, x0: torch.Tensor, c: Conditioning) -> torch.Tensor:
        dtype = self.head.weight.dtype
        image = self.image(x0.to(dtype)).flatten(2).transpose(1, 2)
        text = self.text(c[CONTEXT].to(dtype))
        asked, _ = self.attention(image, text, text, need_weights=False)
        return self.head(self.mixer(torch.cat([image, asked], dim=2)).mean(1)).flatten()

    @torch.no_grad()
    def standardise(self, scores_M: torch.Tensor) -> torch.Tensor:
        """Take the scores of an update into the running mean and deviation, and return their standard scores."""
        found = torch.stack([scores_M.double().mean(), scores_M.double().std(correction=0)])
        moments = self.records["moments"]
        moments.copy_(torch.where(moments.any(), KEPT * moments + (1 - KEPT) * found, found))
        return ((scores_M.double() - moments[0]) / moments[1].clamp(min=1e-6)).to(self.head.weight.dtype)

    @torch.no_grad()
    def remember(self, error: torch.Tensor, standard_M: torch.Tensor) -> None:
        """Keep how well it predicted scores of samples that it had not seen. error: the sum of its squared errors."""
        spread = (standard_M - standard_M.mean()).double().square().sum()
        for name, value in {"errors": error.double(), "spreads": spread}.items():
            self.records[name].copy_(torch.cat([self.records[name][1:], value[None]]))

    def last_errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared error and the squares about the mean of the last update, summed over its samples."""
        return self.records["errors"][-1].detach().clone(), self.records["spreads"][-1].detach().clone()

    def fit(self) -> torch.Tensor:
        """The share of the variance that it explained in the last updates, below 0 if it is worse than the mean."""
        error, spread = self.records["errors"].sum(), self.records["spreads"].sum()
        return torch.where(spread > 0, 1 - error / spread.clamp(min=1e-12), torch.zeros_like(error))


class Surrogate:
    """The RL loss of a batch: minus the mean standard score that the surrogate gives its x0.

    weights: where the rewards of the config lie. seed: of the words
    that a preference draws, and of the surrogate's first parameters.

    Raises:
        ConfigError: a reward is unknown or broken.
        InputMissing, DataError: the weights of a reward are missing, or damaged.
    """

    def __init__(
        self, config: SurrogateConfig, base: SharedBase, weights: RewardSources | None = None, *, seed: int = 0
    ) -> None:
        self.config, self.base = config, base
        self.reward = Mixture(config, base.backbone, differentiable=False, weights=weights, seed=seed)
        channels, side, _ = base.backbone.latent_shape
        device = base.backbone.network.device
        with torch.random.fork_rng(), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.manual_seed(seed)
            self.network = ScoreNetwork(channels, side, base.backbone.blank()["context"].shape[-1], config)
        self.network.to(device)
        self.learned: list[torch.Tensor] = [each for each in self.network.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(self.learned, lr=config.learning_rate, betas=BETAS)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        averaged = {f"average.{name}": each for name, each in self.average.named_parameters() if "records" not in name}
        self.own = Trainable(dict(self.network.named_parameters()) | averaged, optimizer, CLIP)
        self.trained: Mapping[str, Trainable] = {NAME: self.own}

    def build_objective(self, window: Window) -> Objective:
        """Score samples of the window, see how well the surrogate predicts them, and fit it to them."""
        network = self.network
        deal = deal_to_rl(self.config, len(window.states.times), window.trajectories)
        assert deal is not None, "a surrogate has samples"
        x0_m, c, records = self.draw_samples(window, deal)
        at_once = window.micro_batch or max(1, len(x0_m))
        found = self.reward.score_samples(x0_m, records, at_once, update=window.update)
        scores = {name: distributed.all_gather_shares(each, deal.states) for name, each in found.items()}
        standard_M = network.standardise(self.reward.mix(scores))
        standard_m = standard_M[distributed.split_evenly(deal.states)]
        with torch.no_grad():
            error = self.sum_errors(self.average, x0_m, c, standard_m)
            network.remember(distributed.all_reduce_sum(error), standard_M)
        trust = network.fit().clamp(0, 1)
        self.learn(x0_m, c, standard_m, deal, window)
        figures = {**summarize_scores(scores), **self.reward.list_moments(scores), "surrogate_fit": network.fit()}
        return Objective(self.compute_loss, figures=figures, trust=trust)

    def compute_loss(self, x0: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
        """Minus the mean standard score of a part of the student's batch."""
        predicted_B = self.average(x0, batch.c)
        return losses.refl(predicted_B) * batch.share, {"surrogate_score": predicted_B.detach().mean() * batch.share}

    def draw_samples(self, window: Window, deal: Deal) -> tuple[torch.Tensor, Conditioning, list[PromptRecord]]:
        """This rank's share of the samples: x0 (m, C, H, W) of randomly drawn steps of its trajectories, their
        conditioning and prompts."""
        mine, steps = share_evenly(deal.states, distributed.ranks(), distributed.rank()), len(window.states.times)
        pairs = window.find_pairs(deal, mine, NAME, steps=steps)
        (batch,) = select_states(window.states, window.c, pairs, of=deal.states)
        return batch.x0, batch.c, [window.records[index] for index in batch.trajectory.tolist()]

    def learn(self, x0_m: torch.Tensor, c: Conditioning, standard_m: torch.Tensor, deal: Deal, window: Window) -> None:
        """Fit the surrogate to the samples of all ranks, in small batches, and take each step into its average.

        Each rank has its own samples of a batch. The gradients are summed, so that all ranks end with the same bits.
        """
        draw, mine = window.generator("surrogate batches"), distributed.split_evenly(deal.states)
        for each in self.learned:
            each.requires_grad_(True)
        for _ in range(self.config.steps):
            rows = torch.randperm(deal.states, generator=draw)[:BATCH]
            own = rows[(rows >= mine.start) & (rows < mine.stop)] - mine.start
            here = send_to(own if len(own) else torch.zeros(1, dtype=torch.int64), x0_m.device)
            c_rows = {key: value[here] for key, value in c.items() if key == CONTEXT}
            errors = self.sum_errors(self.network, x0_m[here], c_rows, standard_m[here])
            self.own.zero_grad()
            (errors * (len(own) > 0) / len(rows)).backward()  # a rank without a sample has gradients all the same
            self.own.step()
            self.take_average()
        self.own.zero_grad()
        for each in self.learned:
            each.requires_grad_(False)  # the student's loss is not to train them

    @torch.no_grad()
    def take_average(self) -> None:
        """average <- d average + (1 - d) network, d = (1 - 1 / u)^3 at the u-th step, up to AVERAGE."""
        steps = self.network.records["steps"]
        steps.add_(1)
        decay = ((1 - 1 / steps) ** 3).clamp(max=AVERAGE).to(self.learned[0].dtype)
        average: list[torch.Tensor] = [each for name, each in self.average.named_parameters() if "records" not in name]
        differences = torch._foreach_sub(self.learned, average)
        torch._foreach_mul_(differences, (1 - decay)[0])
        torch._foreach_add_(average, differences)

    @staticmethod
    def sum_errors(
        network: ScoreNetwork, x0_m: torch.Tensor, c: Conditioning, standard_m: torch.Tensor
    ) -> torch.Tensor:
        """The squared errors of these samples, summed."""
        return F.mse_loss(network(x0_m, c), standard_m, reduction="sum")
