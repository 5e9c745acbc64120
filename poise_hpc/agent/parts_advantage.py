"""Catalogue: selection, reward shaping, statistics, baselines, normalization, weighting, and what leaves the loss."""
from __future__ import annotations

from .catalogue import Knob, Part

STD_FLOOR = Knob("std_floor", 1e-6, (1e-6,), "added to the standard deviation")
CROSS_GROUP = frozenset({"group-std", "analytic-variance", "conditional-normalization", "smoothed-std"})

SELECTION = (
    Part(
        "dynamic-sampling", "selection", "DS", "DAPO, Yu et al. 2025, arXiv:2503.14476",
        "train on groups with 0 < pass rate < 1 only",
        "drops groups that carry no gradient and keeps the effective batch full of informative ones",
        code='p = pass_rate(rollouts.components["correct"], g)\n'
             "keep[g] = (p > 0) & (p < 1)",
        helps=("zero-variance", "no-learning"),
    ),
    Part(
        "difficulty-band", "selection", "BAND", "Online Difficulty Filtering, Bae et al. 2025, arXiv:2504.03380",
        "train on groups with low <= pass rate <= high",
        "spends the batch on problems of intermediate difficulty, where the reward variance is largest",
        code='p = pass_rate(rollouts.components["correct"], g)\n'
             "keep[g] = (p >= self.band_low) & (p <= self.band_high)",
        knobs=(Knob("band_low", 0.1, (0.05, 0.1), "smallest pass rate of a group to train on"),
               Knob("band_high", 0.8, (0.7, 0.8, 0.9), "largest pass rate")),
        off={"band_low": 0.0, "band_high": 1.0},
        helps=("zero-variance", "no-learning"),
    ),
)

REWARD = (
    Part(
        "overlong-penalty", "reward", "OVERLONG", "DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13",
        "R <- R - weight * clip((|y| - (1 - buffer) L_max) / (buffer L_max), 0, 1)",
        "tells the policy before the hard limit that it runs out of tokens",
        code="limit, buffer = rollouts.max_length, self.overlong_buffer * rollouts.max_length\n"
             "R = R - self.overlong_weight * ((rollouts.length - (limit - buffer)) / buffer).clamp(0, 1)",
        knobs=(Knob("overlong_weight", 1.0, (0.25, 0.5, 1.0), "penalty at the limit"),
               Knob("overlong_buffer", 0.2, (0.2, 0.4), "share of the limit over which it grows")),
        off={"overlong_weight": 0.0},
        helps=("length-explosion", "truncation"),
    ),
    Part(
        "kimi-length", "reward", "KIMILEN", "Kimi k1.5, Kimi Team 2025, arXiv:2501.12599",
        "u = 1/2 - (|y| - min |y|) / (max |y| - min |y|); R <- R + weight * (u if correct else min(u, 0))",
        "rewards the shorter correct completion of a group and never a short wrong one",
        code="L = rollouts.length.float()\n"
             "empty = L.new_zeros(rollouts.groups)\n"
             'shortest = empty.scatter_reduce(0, g, L, "amin", include_self=False)[g]\n'
             'longest = empty.scatter_reduce(0, g, L, "amax", include_self=False)[g]\n'
             "u = 0.5 - (L - shortest) / (longest - shortest).clamp(min=1)\n"
             'u = torch.where(rollouts.components["correct"] > 0, u, u.clamp(max=0))\n'
             "R = R + self.kimi_weight * u * (longest > shortest).float()",
        knobs=(Knob("kimi_weight", 0.2, (0.1, 0.2, 0.4), "weight of the length reward"),),
        off={"kimi_weight": 0.0},
        helps=("length-explosion", "truncation"),
    ),
    Part(
        "solve-rate-length", "reward", "ALP", "ALP, Xiang et al. 2025, arXiv:2506.05256",
        "R <- R - weight * |y| / L_max * max(pass rate, 1 / G)",
        "charges tokens in proportion to how easy the problem is, and leaves hard problems their length",
        code='p = pass_rate(rollouts.components["correct"], g)\n'
             "price = torch.maximum(p, 1 / group_size(g))\n"
             "R = R - self.alp_weight * price * rollouts.length / rollouts.max_length",
        knobs=(Knob("alp_weight", 0.1, (0.05, 0.1, 0.2), "price of a completion at the limit, on a solved problem"),),
        off={"alp_weight": 0.0},
        helps=("length-explosion",),
    ),
    Part(
        "unlikeliness", "reward", "UNLIKELY", "Rewarding the Unlikely, He et al. 2025, arXiv:2506.02355",
        "R <- R (1 - beta (G - rank) / G), rank 0 for the most likely completion of the group, correct ones only",
        "pushes up rare correct completions more than frequent ones, against sharpening of the distribution",
        code="logp = torch.where(rollouts.mask, rollouts.logp_old, 0.0).sum(-1)\n"
             "likelier = (g.unsqueeze(0) == g.unsqueeze(1)) & (logp.unsqueeze(0) > logp.unsqueeze(1))\n"
             "G, rank = group_size(g), likelier.sum(-1)\n"
             'discount = self.unlikeliness_beta * (G - rank) / G * (rollouts.components["correct"] > 0)\n'
             "R = R * (1 - discount)",
        knobs=(Knob("unlikeliness_beta", 0.25, (0.1, 0.25, 0.5), "beta, share of reward lost by the likeliest"),),
        off={"unlikeliness_beta": 0.0},
        helps=("entropy-collapse",),
    ),
)

STATISTICS = (
    Part(
        "validity-masking", "statistics", "VM", "POISE, Xia et al. 2026, arXiv:2603.23951 (exact formula not published)",
        "group statistics over completions with a parseable answer only",
        "keeps broken formats from moving the baseline that well-formed answers are compared with",
        code="live = rollouts.valid | (not self.validity_masking)\n"
             "# invalid ones in units of the whole group: the std of valid ones is 0 when these are all right\n"
             "spread = torch.where(live, group_std(R, g, live), group_std(R, g))",
        helps=("validity-loss",),
    ),
)

BASELINE = (
    Part(
        "group-mean", "baseline", "", "GRPO, Shao et al. 2024, arXiv:2402.03300", "A = R - mean R",
        "compares a completion with its group",
        code="A = R - group_mean(R, g{live})",
    ),
    Part(
        "leave-one-out", "baseline", "RLOO", "RLOO, Ahmadian et al. 2024, arXiv:2402.14740",
        "A = R - mean of the others = G / (G - 1) (R - mean R)",
        "removes a completion's own reward from its baseline, which makes the estimate unbiased",
        code="G = group_size(g)\nA = (R - group_mean(R, g)) * G / (G - 1).clamp(min=1)",
        implies={"normalization": "no-std"}, conflicts=frozenset({"validity-masking"}),
        helps=("late-collapse",),
    ),
    Part(
        "length-weighted-baseline", "baseline", "OPO", "OPO, Hao et al. 2025, arXiv:2505.23585",
        "A = R - sum |y| R / sum |y|",
        "uses the variance-minimizing baseline for sequences whose gradient norm grows with length",
        code="L, C = rollouts.length.float(), R - group_mean(R, g)\n"
             "A = C - group_mean(C * L, g) / group_mean(L, g).clamp(min=1)",
        implies={"normalization": "no-std"}, conflicts=frozenset({"validity-masking"}),
        helps=("gradient-spike", "length-collapse"),
    ),
    Part(
        "quantile-baseline", "baseline", "QAE", "QAE, Wu et al. 2025, arXiv:2509.22611",
        "A = R - K-quantile of the group's R",
        "reinforces rare successes on hard prompts and targets the remaining failures on easy ones",
        code="A = torch.zeros_like(R)\n"
             "for k in range(rollouts.groups):\n"
             "    rows = g == k\n"
             "    if rows.any():\n"
             '        A[rows] = R[rows] - torch.quantile(R[rows], self.quantile, interpolation="lower")',
        knobs=(Knob("quantile", 0.4, (0.3, 0.4, 0.5, 0.6), "K"),),
        conflicts=frozenset({"validity-masking"}),
        helps=("entropy-collapse",),
    ),
    Part(
        "maxrl", "baseline", "MAXRL", "MaxRL, 2026, arXiv:2602.02710", "A = (R - mean R) / max(mean R, 1 / G)",
        "scales with 1 / pass rate, so that the first successes on a hard prompt weigh most",
        code="mean = group_mean(R, g)\nA = (R - mean) / torch.maximum(mean, 1 / group_size(g))",
        implies={"normalization": "no-std"}, conflicts=frozenset({"validity-masking"}),
        helps=("no-learning", "zero-variance"),
    ),
    Part(
        "pass-at-k", "baseline", "PASSK", "Pass@k Training, Chen et al. 2025, arXiv:2508.10751, analytic form",
        "p_k = 1 - C(W, k) / C(G, k), W wrong of G; A+ = (1 - p_k) / s, A- = (1 - p_k - C(W-1, k-1) / C(G-1, k-1)) / s, "
        "s = sqrt(p_k (1 - p_k))",
        "rewards a group for at least one success in k, which stops sharpening what is solved already",
        code='correct = (rollouts.components["correct"] > 0).float()\n'
             "G = group_size(g)\n"
             "W = G - (group_mean(correct, g) * G).round()\n"
             "k = torch.minimum(torch.full_like(G, self.pass_k), (G / 2).floor().clamp(min=1))\n"
             "none, rest = torch.ones_like(G), torch.ones_like(G)  # C(W, k) / C(G, k) and C(W-1, k-1) / C(G-1, k-1)\n"
             "for i in range(int(self.pass_k)):\n"
             "    none = none * torch.where(i < k, (W - i).clamp(min=0) / (G - i).clamp(min=1), 1.0)\n"
             "    rest = rest * torch.where(i + 1 < k, (W - 1 - i).clamp(min=0) / (G - 1 - i).clamp(min=1), 1.0)\n"
             "s = ((1 - none) * none).sqrt()\n"
             "A = torch.where(correct > 0, none, none - rest)\n"
             "A = torch.where(s > 0, A / s.clamp(min=1e-3), 0.0)",
        knobs=(Knob("pass_k", 4, (2, 3, 4), "k, at most half the group"),),
        implies={"normalization": "no-std"},
        conflicts=frozenset({"validity-masking", "overlong-penalty", "kimi-length", "solve-rate-length", "unlikeliness"}),
        helps=("entropy-collapse", "no-learning"),
    ),
    Part(
        "shrinkage-baseline", "baseline", "SHRINK", "Shrinkage Baselines, Zeng et al. 2025, arXiv:2511.03710 (one-level form)",
        "A = R - ((1 - c) group mean + c batch mean), c = v / (v + s^2): v variance of a group mean, s^2 between groups",
        "borrows strength across prompts where a group's mean is noisy, and lets zero-variance groups teach",
        code="mean, whole = group_mean(R, g), group_mean(R, torch.zeros_like(g))\n"
             "within = (group_std(R, g).square() / group_size(g)).mean()\n"
             "between = (mean - whole).square().mean()\n"
             "A = (R - mean) + within / (within + between).clamp(min=1e-12) * (mean - whole)",
        conflicts=CROSS_GROUP | {"validity-masking"},
        helps=("zero-variance", "gradient-spike"),
    ),
    Part(
        "batch-mean", "baseline", "BATCHMEAN", "REINFORCE++, Hu et al. 2025, arXiv:2501.03262", "A = R - mean R over the batch",
        "gives every prompt a signal, also where all completions of a group agree",
        code="A = R - group_mean(R, torch.zeros_like(g))",
        conflicts=CROSS_GROUP | {"validity-masking"},
        helps=("zero-variance",),
    ),
    Part(
        "running-baseline", "baseline", "EMA", "REINFORCE with a moving baseline, Williams 1992",
        "A = R - b, b <- rho b + (1 - rho) mean R of the batch",
        "compares with the policy's recent past, so that the baseline is not made of the same noisy rewards",
        code='A = R - state.get("baseline", float(R.mean()))',
        after='state["baseline"] = self.ema * state.get("baseline", float(R.mean())) + (1 - self.ema) * float(R.mean())',
        knobs=(Knob("ema", 0.9, (0.8, 0.9, 0.95), "rho"),),
        conflicts=CROSS_GROUP | {"validity-masking"},
        helps=("zero-variance",),
    ),
)

NORMALIZATION = (
    Part(
        "group-std", "normalization", "", "GRPO, Shao et al. 2024, arXiv:2402.03300", "A <- A / (std R + floor)",
        "gives every group the same scale",
        code="A = A / ({std} + self.std_floor)", knobs=(STD_FLOOR,),
    ),
    Part(
        "no-std", "normalization", "NOSTD", "Dr.GRPO, Liu et al. 2025, arXiv:2503.20783", "A is not divided by std R",
        "removes the bias towards prompts that are nearly always or nearly never solved",
        code="if self.divide_by_std:\n    A = A / ({std} + self.std_floor)",
        knobs=(Knob("divide_by_std", False, (False,), "GRPO divides, this does not"), STD_FLOOR),
        off={"divide_by_std": True},
        helps=("gradient-spike",),
    ),
    Part(
        "batch-std", "normalization", "BATCHSTD", "REINFORCE++, Hu et al. 2025, arXiv:2501.03262; Lite PPO, Liu et al. 2025, arXiv:2508.08221",
        "A <- A / (std of A over the batch + floor)",
        "keeps the differences in scale between prompts but a steady scale per step",
        code="A = A / (A.std(correction=0) + self.std_floor)", knobs=(STD_FLOOR,),
        helps=("gradient-spike", "kl-spike"),
    ),
    Part(
        "analytic-variance", "normalization", "AV", "POISE, Xia et al. 2026, arXiv:2603.23951 (exact formula not published)",
        "A <- A / (p (1 - p))^exponent, p = (K + prior) / (G + 2 prior), K right of G",
        "scales by the variance of correctness, not of the whole reward, so that a sparse success keeps a strong gradient",
        code="G = group_size(g{live})\n"
             'p = (pass_rate(rollouts.components["correct"], g{live}) * G + self.prior) / (G + 2 * self.prior)\n'
             "A = A / (p * (1 - p)) ** self.exponent",
        knobs=(Knob("prior", 1.0, (0.5, 1.0, 2.0), "pseudo-counts of a right and of a wrong completion"),
               Knob("exponent", 0.5, (0.5, 1.0), "of the variance")),
        helps=("no-learning", "reward-hacking"),
    ),
    Part(
        "smoothed-std", "normalization", "SMOOTH", "between GRPO, arXiv:2402.03300, and Dr.GRPO, arXiv:2503.20783",
        "A <- A / (std R + c)",
        "keeps the scale of a group from blowing up when one completion differs",
        code="A = A / ({std} + self.std_smoothing)",
        knobs=(Knob("std_smoothing", 0.25, (0.1, 0.25, 0.5), "c, in units of reward"),),
        helps=("gradient-spike", "kl-spike"),
    ),
    Part(
        "conditional-normalization", "normalization", "CN", "POISE, Xia et al. 2026, arXiv:2603.23951 (exact formula not published)",
        "A <- A / (std R + floor) in mixed groups, wrong_scale A where all are wrong, right_scale A where all are right",
        "does not blow small shaping differences up to full scale where correctness cannot tell completions apart",
        code='p = pass_rate(rollouts.components["correct"], g)\n'
             "scale = torch.where(p == 0, self.wrong_scale, self.right_scale)\n"
             "A = torch.where((p > 0) & (p < 1), A / ({std} + self.std_floor), scale * A)",
        knobs=(STD_FLOOR, Knob("wrong_scale", 1.0, (0.0, 0.5, 1.0), "of A in all-wrong groups"),
               Knob("right_scale", 0.0, (0.0, 0.25, 0.5), "of A in all-right groups")),
        wants_shaping=True,
        helps=("reward-hacking", "length-collapse"),
    ),
)

SHAPING = (
    Part(
        "gated-length", "shaping", "GATEDLEN", "correctness-first efficiency shaping, POISE, Xia et al. 2026, arXiv:2603.23951 (exact formula not published)",
        "A <- A + weight 1[p >= gate] 1[right] clip((mean_r |y| - |y|) / mean_r |y|, -1, 1), mean_r over the group's right ones",
        "shortens only where the group already solves the problem, so that brevity never competes with correctness",
        code='right, L = rollouts.components["correct"] > 0, rollouts.length.to(R.dtype)\n'
             "typical = group_mean(L, g, right).clamp(min=1)\n"
             'counts = right & (pass_rate(rollouts.components["correct"], g) >= self.length_gate)\n'
             "A = A + self.length_weight * counts * ((typical - L) / typical).clamp(-1, 1)",
        knobs=(Knob("length_weight", 0.2, (0.1, 0.2, 0.5), "of the length term"),
               Knob("length_gate", 0.75, (0.5, 0.75, 1.0), "pass rate from which length counts")),
        off={"length_weight": 0.0},
        helps=("length-explosion", "truncation"),
    ),
)

WEIGHTING = (
    Part(
        "positive-weight", "weighting", "WPOS", "W-REINFORCE, Zhu et al. 2025, arXiv:2506.01347", "A <- c A where A > 0",
        "learns mostly from mistakes, which spreads probability over what is left and keeps entropy",
        code="A = torch.where(A > 0, self.positive_weight * A, A)",
        knobs=(Knob("positive_weight", 0.1, (0.1, 0.3, 0.5), "c"),),
        off={"positive_weight": 1.0},
        helps=("entropy-collapse",),
    ),
    Part(
        "negative-weight", "weighting", "WNEG", "RAFT and Reinforce-Rej, Xiong et al. 2025, arXiv:2504.11343 (c = 0: RAFT)",
        "A <- c A where A < 0",
        "limits the unbounded push-down of failures, which is what drives a policy far from its samples",
        code="A = torch.where(A < 0, self.negative_weight * A, A)",
        knobs=(Knob("negative_weight", 0.5, (0.0, 0.25, 0.5, 0.75), "c"),),
        off={"negative_weight": 1.0},
        helps=("late-collapse", "kl-spike", "validity-loss"),
    ),
    Part(
        "difficulty-weight", "weighting", "LEAD", "GRPO-LEAD, Zhang & Zuo 2025, arXiv:2504.09696",
        "A <- A u(p) where A > 0, A u(1 - p) where A < 0, u(x) = 0.4 + 1.1 / (1 + exp(k (x - x0)))",
        "moves weight from easy successes to hard ones",
        code='p = pass_rate(rollouts.components["correct"], g)\n'
             "x = torch.where(A > 0, p, 1 - p)\n"
             "A = A * (0.4 + 1.1 * torch.sigmoid(-self.lead_slope * (x - self.lead_center)))",
        knobs=(Knob("lead_slope", 10.0, (5.0, 10.0), "k"), Knob("lead_center", 0.75, (0.5, 0.75), "x0")),
        helps=("no-learning",),
    ),
    Part(
        "entropy-advantage", "weighting", "ENTADV", "Reasoning with Exploration, Cheng et al. 2025, arXiv:2506.14758",
        "A_t <- A + min(alpha H_t, |A| / kappa)",
        "rewards tokens at which the policy was undecided, without ever turning a failure into a success",
        code="H = torch.where(rollouts.mask, rollouts.entropy, 0.0)\n"
             "A = A.unsqueeze(-1)\n"
             "A = A + torch.minimum(self.entropy_alpha * H, A.abs() / self.entropy_kappa)",
        knobs=(Knob("entropy_alpha", 0.4, (0.1, 0.2, 0.4), "alpha"), Knob("entropy_kappa", 2.0, (2.0, 4.0), "kappa > 1 keeps A's sign")),
        off={"entropy_alpha": 0.0}, needs="entropy",
        helps=("entropy-collapse",),
    ),
    Part(
        "probability-weight", "weighting", "ARW", "Advantage Reweighting, Yang et al. 2025, arXiv:2505.12929",
        "A_t <- A (alpha pi_old(y_t) + 1 - alpha)",
        "keeps rare tokens, whose gradients are largest, from dominating the update",
        code="p = torch.where(rollouts.mask, rollouts.logp_old, 0.0).exp()\n"
             "A = A.unsqueeze(-1) * (self.probability_alpha * p + 1 - self.probability_alpha)",
        knobs=(Knob("probability_alpha", 0.3, (0.1, 0.3, 0.5), "alpha"),),
        off={"probability_alpha": 0.0},
        helps=("gradient-spike", "kl-spike", "late-collapse"),
    ),
    Part(
        "covariance-mask", "weighting", "COV", "Clip-Cov, Cui et al. 2025, arXiv:2505.22617 (here: the top share, at pi_old)",
        "A_t <- 0 at the share of tokens with the largest (log pi_old - mean)(A - mean)",
        "takes out the few tokens whose covariance with the advantage drives the entropy down",
        code="live_logp, spread = rollouts.logp_old[rollouts.mask], A.unsqueeze(-1).expand_as(rollouts.logp_old)\n"
             "covariance = (rollouts.logp_old - live_logp.mean()) * (spread - spread[rollouts.mask].mean())\n"
             "top = covariance[rollouts.mask].topk(int(self.covariance_share * live_logp.numel())).values\n"
             "A = spread if top.numel() == 0 else torch.where(covariance >= top.min().clamp(min=1e-12), 0.0, spread)",
        knobs=(Knob("covariance_share", 0.01, (0.002, 0.01, 0.02), "share of tokens taken out"),),
        off={"covariance_share": 0.0},
        helps=("entropy-collapse", "late-collapse"),
    ),
    Part(
        "forking-tokens", "weighting", "FORK", "Beyond the 80/20 Rule, Wang et al. 2025, arXiv:2506.01939",
        "A_t <- A at the share of tokens with the largest entropy, 0 elsewhere",
        "spends the update on the few tokens that decide where a completion goes",
        code="H = torch.where(rollouts.mask, rollouts.entropy, -1.0)\n"
             "count = max(1, int(self.forking_share * int(rollouts.mask.sum())))\n"
             "A = torch.where(H >= H.flatten().topk(count).values.min(), A.unsqueeze(-1), 0.0)",
        knobs=(Knob("forking_share", 0.2, (0.2, 0.35, 0.5), "share of tokens that are trained"),),
        off={"forking_share": 1.0}, needs="entropy",
        helps=("entropy-collapse", "late-collapse"),
    ),
)

KEEP = (
    Part(
        "drop-truncated", "keep", "NOTRUNC", "overlong filtering, DAPO, Yu et al. 2025, arXiv:2503.14476",
        "completions cut at the token limit leave the loss and Z",
        "does not punish sound reasoning for the token limit",
        code="keep = ~rollouts.truncated if self.drop_truncated else None",
        helps=("truncation", "length-collapse"),
    ),
    Part(
        "drop-void", "keep", "NOVOID", "void-turn filtering, SimpleTIR, Xue et al. 2025, arXiv:2509.02479 (here: no parseable answer)",
        "completions without a parseable answer leave the loss and Z",
        "keeps the large gradients of broken, low-probability text out of the update",
        code="keep = rollouts.valid if self.drop_void else None",
        conflicts=frozenset({"validity-masking"}),
        helps=("gradient-spike",),
    ),
)

PARTS = (*SELECTION, *REWARD, *STATISTICS, *BASELINE, *NORMALIZATION, *SHAPING, *WEIGHTING, *KEEP)
