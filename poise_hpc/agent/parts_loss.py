"""Catalogue: ratio level, clipping, trust masks, KL and entropy terms, reductions.

`d` is log pi_theta - log pi_old, 0 at padded tokens, `w` the ratio that the surrogate uses.
"""
from __future__ import annotations

from .catalogue import Knob, Part

PPO = "PPO, Schulman et al. 2017, arXiv:1707.06347"
CLIP_LOW = Knob("clip_low", 0.2, (0.1, 0.2, 0.3), "epsilon below 1")
CLIP_HIGH = Knob("clip_high", 0.28, (0.24, 0.28, 0.4), "epsilon above 1")
CLIP = Knob("clip", 0.2, (0.1, 0.2, 0.3), "epsilon")
# A sequence's mean log-ratio moves less than a token's. GSPO has 3e-4 and 4e-4 for completions of thousands of tokens; its
# spread falls with the root of the length, so that short completions want more.
NARROW, NARROW_HIGH = (0.0003, 0.003, 0.01, 0.03), (0.0004, 0.004, 0.02, 0.05)
TOKEN_ONLY = frozenset({"sequence-ratio"})

RATIO = (
    Part("token-ratio", "ratio", "", "GRPO, Shao et al. 2024, arXiv:2402.03300", "w_t = pi / pi_old of the token",
         "corrects each token", code="w = d.exp()"),
    Part(
        "sequence-ratio", "ratio", "SEQ", "GSPO, Zheng et al. 2025, arXiv:2507.18071", "w = exp(mean_t log-ratio), the same for every token",
        "matches the unit of the reward, and averages out the noise of single tokens' ratios",
        code="w = masked_mean(d, batch.mask).exp().expand_as(d)",
        helps=("late-collapse", "kl-spike"),
        retune={"clip": NARROW, "clip_low": NARROW, "clip_high": NARROW_HIGH},
    ),
)

CLIPPING = (
    Part("symmetric-clip", "clipping", "", PPO, "l = -min(w A, clip(w, 1 - eps, 1 + eps) A)", "bounds the step",
         code="loss = clipped(w, A, self.clip, self.clip)", knobs=(CLIP,)),
    Part(
        "clip-higher", "clipping", "CLIPHIGHER", "DAPO, Yu et al. 2025, arXiv:2503.14476",
        "l = -min(w A, clip(w, 1 - eps_low, 1 + eps_high) A), eps_high > eps_low",
        "leaves unlikely tokens room to grow, which keeps exploration alive",
        code="loss = clipped(w, A, self.clip_low, self.clip_high)",
        knobs=(CLIP_LOW, CLIP_HIGH), off={"clip_high": "=clip_low"},
        helps=("entropy-collapse", "no-learning"),
    ),
    Part(
        "dual-clip", "clipping", "DUALCLIP", "dual-clip PPO, Ye et al. 2019, arXiv:1912.09729",
        "as PPO, and l <= c |A| where A < 0",
        "bounds the loss of failures whose ratio has grown far above 1",
        code="loss = clipped(w, A, self.clip, self.clip)\n"
             "loss = torch.where(A < 0, torch.minimum(loss, -self.dual_clip * A), loss)",
        knobs=(CLIP, Knob("dual_clip", 3.0, (1.5, 2.0, 3.0), "c > 1, largest ratio that counts where A < 0")),
        off={"dual_clip": 1e9},
        helps=("late-collapse", "gradient-spike", "kl-spike"),
    ),
    Part(
        "annealed-clip", "clipping", "ANNEALCLIP", PPO + " (Atari setting)",
        "eps <- eps (1 - anneal * progress)",
        "takes bold steps first and small ones when the policy has more to lose",
        code="eps = self.clip * (1 - self.clip_anneal * batch.progress)\n"
             "loss = clipped(w, A, eps, eps)",
        knobs=(CLIP, Knob("clip_anneal", 0.75, (0.5, 0.75, 0.9), "share of epsilon that is gone at the end")),
        off={"clip_anneal": 0.0},
        helps=("late-collapse", "kl-spike"),
    ),
    Part(
        "adaptive-clip", "clipping", "DCPO", "DCPO, Yang et al. 2025, arXiv:2509.02333",
        "(1 + sqrt(max(1 - 4 eps_low / q, 0))) / 2 <= w <= (1 + sqrt(1 + 4 eps_high / q)) / 2, q = pi_old(y_t), w <= 10",
        "widens the trust region of rare tokens, whose ratio moves most for the same change in probability",
        code="q = torch.where(batch.mask, batch.logp_old, 0.0).exp().clamp(min=1e-6)\n"
             "low = (1 + (1 - 4 * self.clip_low / q).clamp(min=0).sqrt()) / 2\n"
             "high = ((1 + (1 + 4 * self.clip_high / q).sqrt()) / 2).clamp(max=10)\n"
             "loss = -torch.minimum(w * A, torch.minimum(torch.maximum(w, low), high) * A)",
        knobs=(Knob("clip_low", 0.16, (0.1, 0.16), "epsilon below 1"), Knob("clip_high", 0.2, (0.2, 0.28), "epsilon above 1")),
        conflicts=TOKEN_ONLY,
        helps=("entropy-collapse",),
    ),
    Part(
        "soft-gate", "clipping", "SAPO", "SAPO, Gao et al. 2025, arXiv:2511.20347",
        "l = -A (4 / tau) sigmoid(tau (w - 1)), tau+ where A > 0, tau- elsewhere",
        "fades the gradient out instead of cutting it, faster for failures",
        code="tau = torch.where(A > 0, self.tau_positive, self.tau_negative)\n"
             "loss = -A * 4 / tau * torch.sigmoid(tau * (w - 1))",
        knobs=(Knob("tau_positive", 1.0, (1.0, 2.0, 4.0), "temperature of the gate where A > 0"),
               Knob("tau_negative", 1.05, (1.05, 2.1, 4.2), "and elsewhere")),
        helps=("late-collapse", "no-learning"),
    ),
    Part(
        "geometric-mean", "clipping", "GMPO", "GMPO, Zhao et al. 2025, arXiv:2507.20673",
        "l = -A exp(mean_t c_t), c_t the log-ratio, clipped to +-range on the side that A pushes to",
        "is insensitive to outliers among the tokens' ratios, so that a wide range can be allowed",
        code="c = torch.where(A > 0, d.clamp(max=self.log_range), d.clamp(min=-self.log_range))\n"
             "loss = -A * masked_mean(c, batch.mask).exp()",
        knobs=(Knob("log_range", 0.4, (0.2, 0.4, 0.6), "bound of a token's log-ratio"),),
        conflicts=TOKEN_ONLY,
        helps=("late-collapse", "kl-spike", "gradient-spike"),
    ),
    Part(
        "detached-weight", "clipping", "CISPO", "CISPO, MiniMax-M1 2025, arXiv:2506.13585",
        "l = -sg(min(w, 1 + eps_high)) A log pi",
        "keeps a gradient from every token; clipping bounds the weight, not the token's part in the update",
        code="loss = -w.detach().clamp(max=1 + self.weight_high) * A * batch.logp",
        knobs=(Knob("weight_high", 1.0, (0.28, 1.0, 3.0), "eps_high"),),
        helps=("entropy-collapse", "no-learning"),
    ),
    Part(
        "inverted-ratio", "clipping", "ASPO", "ASPO, Wang et al. 2025, arXiv:2510.06062",
        "where A > 0: l = -A v, v = sg(min(1/w, max)) pi / sg(pi), no gradient where w > 1 + eps_high; elsewhere PPO",
        "gives successful but unlikely tokens the larger weight, where PPO gives it to the likely ones",
        code="weight = (-d.detach()).exp().clamp(max=self.inverse_max)\n"
             "v = torch.where(d.detach().exp() > 1 + self.clip_high, weight, weight * (d - d.detach()).exp())\n"
             "loss = torch.where(A > 0, -A * v, clipped(w, A, self.clip_low, self.clip_high))",
        knobs=(CLIP_LOW, CLIP_HIGH, Knob("inverse_max", 3.0, (2.0, 3.0), "largest inverted weight")),
        conflicts=TOKEN_ONLY,
        helps=("entropy-collapse",),
    ),
    Part(
        "tapered", "clipping", "TOPR", "TOPR, Le Roux et al. 2025, arXiv:2503.14286",
        "l = -u A log pi, u = 1 where A >= 0, clip(pi / pi_old of the completion, 0, 1) elsewhere, no gradient through u",
        "lets failures fade as they become unlikely and never slows a success down",
        code="u = torch.where(A >= 0, 1.0, sequence_log_ratio(batch).detach().clamp(max=0).exp())\n"
             "loss = -u * A * batch.logp",
        conflicts=TOKEN_ONLY,
        helps=("late-collapse", "kl-spike", "validity-loss"),
    ),
    Part(
        "no-ratio", "clipping", "GPG", "GPG, Chu et al. 2025, arXiv:2504.02546; RGRA, arXiv:2603.18756", "l = -A log pi",
        "drops ratio and clip: with few updates a batch they only add variance",
        code="loss = -A * batch.logp",
        conflicts=TOKEN_ONLY,
        helps=("no-learning",),
    ),
    Part(
        "gradient-preserving", "clipping", "GPPO", "GPPO, Klear-Reasoner, Su et al. 2025, arXiv:2508.07629",
        "l = -min(w A, sg(clip(w) / w) w A)",
        "bounds the value of an update and keeps a bounded gradient from tokens that PPO would drop",
        code="kept = w.detach().clamp(1 - self.clip_low, 1 + self.clip_high) / w.detach() * w\n"
             "loss = -torch.minimum(w * A, kept * A)",
        knobs=(CLIP_LOW, CLIP_HIGH), conflicts=TOKEN_ONLY,
        helps=("entropy-collapse", "no-learning"),
    ),
    Part(
        "quadratic-penalty", "clipping", "SPO", "Simple Policy Optimization, Xie et al. 2024, arXiv:2401.16025",
        "l = -(w A - |A| (w - 1)^2 / (2 eps))",
        "pulls a ratio back that left the trust region, where a clip only stops pushing",
        code="loss = -(w * A - A.abs() * (w - 1).square() / (2 * self.clip))",
        knobs=(CLIP,),
        helps=("late-collapse", "kl-spike"),
    ),
)

TRUST = (
    Part(
        "off-policy-mask", "trust", "OPMASK", "DeepSeek-V3.2, 2025, arXiv:2512.02556",
        "l = 0 for completions with A < 0 and mean_t(log pi_old - log pi) > delta",
        "stops learning from failures that the policy would hardly produce any more",
        code="drift = -masked_mean(d.detach(), batch.mask)\n"
             "loss = torch.where((A < 0) & (drift > self.drift_limit), 0.0, loss)",
        knobs=(Knob("drift_limit", 0.1, (0.05, 0.1, 0.3), "delta, nats per token"),),
        off={"drift_limit": 1e9},
        helps=("late-collapse", "kl-spike"),
    ),
)

KL = (
    Part(
        "kl-k3", "kl", "KL", "GRPO, Shao et al. 2024, arXiv:2402.03300, eq. 4",
        "l <- l + beta (exp(-q) - 1 + q), q = log pi - log pi_ref",
        "keeps the policy near its start, which protects the format and the diversity it had",
        code="loss = loss + self.kl_beta * k3(batch)",
        knobs=(Knob("kl_beta", 0.01, (0.001, 0.003, 0.01, 0.04), "beta"),),
        off={"kl_beta": 0.0}, needs="ref_logp", zero_safe=False,
        helps=("late-collapse", "validity-loss", "entropy-collapse", "reward-hacking"),
    ),
    Part(
        "kl-k2", "kl", "KL2", "k2 estimator, Schulman 2020, joschu.net/blog/kl-approx.html",
        "l <- l + beta q^2 / 2, q = log pi - log pi_ref",
        "has the gradient of the reverse KL in expectation, and a bounded slope where the policy has lost a token",
        code="loss = loss + self.kl_beta * k2(batch)",
        knobs=(Knob("kl_beta", 0.01, (0.001, 0.003, 0.01, 0.04), "beta"),),
        off={"kl_beta": 0.0}, needs="ref_logp", zero_safe=False,
        helps=("late-collapse", "validity-loss", "kl-spike"),
    ),
    Part(
        "kl-decay", "kl", "KLDECAY", "GRPO, arXiv:2402.03300, with a linear schedule",
        "l <- l + beta (1 - progress) (exp(-q) - 1 + q)",
        "holds the policy while its advantages are noisiest and lets go when it is good",
        code="loss = loss + self.kl_beta * (1 - batch.progress) * k3(batch)",
        knobs=(Knob("kl_beta", 0.01, (0.003, 0.01, 0.04), "beta at the start"),),
        off={"kl_beta": 0.0}, needs="ref_logp", zero_safe=False,
        helps=("validity-loss", "kl-spike"),
    ),
    Part(
        "kl-old", "kl", "KLOLD", PPO + ", eq. 8 with a fixed beta",
        "l <- l + beta (exp(d) - 1 - d), an estimate of KL(pi_old, pi)",
        "is a soft trust region around the sampling policy, also for tokens that the clip lets pass",
        code="loss = loss + self.kl_old_beta * (d.exp() - 1 - d)",
        knobs=(Knob("kl_old_beta", 0.1, (0.03, 0.1, 0.3), "beta"),),
        off={"kl_old_beta": 0.0}, zero_safe=False,
        helps=("late-collapse", "kl-spike", "gradient-spike"),
    ),
)

ENTROPY = (
    Part(
        "entropy-bonus", "entropy", "ENT", "A3C, Mnih et al. 2016, arXiv:1602.01783", "l <- l - c H",
        "pays for undecided tokens and so works against a collapse of the entropy",
        code="loss = loss - self.entropy_coef * batch.entropy",
        knobs=(Knob("entropy_coef", 0.003, (0.001, 0.003, 0.01), "c"),),
        off={"entropy_coef": 0.0}, needs="entropy", zero_safe=False,
        helps=("entropy-collapse",),
    ),
    Part(
        "entropy-decay", "entropy", "ENTDECAY", "A3C, arXiv:1602.01783, with a linear schedule", "l <- l - c (1 - progress) H",
        "explores first and lets the policy commit at the end",
        code="loss = loss - self.entropy_coef * (1 - batch.progress) * batch.entropy",
        knobs=(Knob("entropy_coef", 0.01, (0.003, 0.01, 0.03), "c at the start"),),
        off={"entropy_coef": 0.0}, needs="entropy", zero_safe=False,
        helps=("entropy-collapse", "no-learning"),
    ),
    Part(
        "entropy-target", "entropy", "ENTTARGET", "Skywork-OR1, He et al. 2025, arXiv:2505.22312 (here: target relative to the start)",
        "l <- l - c H; per step c += delta if mean H < target, else c = max(0, c - delta)",
        "pays for entropy only when there is too little of it",
        code='loss = loss - state["entropy_coef"] * batch.entropy',
        state={"entropy_coef": 0.0, "entropy_start": 0.0},
        after="H = float(rollouts.entropy[rollouts.mask].mean()) if rollouts.mask.any() else 0.0\n"
              'state["entropy_start"] = state["entropy_start"] or H\n'
              'step = self.entropy_step if H < self.entropy_target * state["entropy_start"] else -self.entropy_step\n'
              'state["entropy_coef"] = max(0.0, state["entropy_coef"] + step)',
        knobs=(Knob("entropy_target", 0.5, (0.3, 0.5, 0.7), "target, as a share of the first step's entropy"),
               Knob("entropy_step", 0.001, (0.0005, 0.001), "delta")),
        off={"entropy_step": 0.0}, needs="entropy", zero_safe=False,
        helps=("entropy-collapse",),
    ),
)

REDUCTION = (
    Part("sequence-mean", "reduction", "", "GRPO, Shao et al. 2024, arXiv:2402.03300", "mean over completions of token means",
         "weighs completions equally", code="SEQ_MEAN_TOKEN_MEAN"),
    Part("token-mean", "reduction", "TOKENMEAN", "DAPO, Yu et al. 2025, arXiv:2503.14476", "mean over all tokens",
         "weighs tokens equally, so that long failures are not diluted", code="TOKEN_MEAN",
         helps=("length-explosion",)),
    Part("sequence-sum-norm", "reduction", "SUMNORM", "Dr.GRPO, Liu et al. 2025, arXiv:2503.20783", "token sum / (completions * L_max)",
         "removes the length bias that makes long failures cheap", code="SEQ_MEAN_TOKEN_SUM_NORM",
         helps=("length-explosion", "length-collapse")),
    Part("sequence-sum", "reduction", "SEQSUM", "RLOO, Ahmadian et al. 2024, arXiv:2402.14740", "mean over completions of token sums",
         "is the exact policy gradient of the expected reward", code="SEQ_MEAN_TOKEN_SUM",
         helps=("length-explosion",)),
)

PARTS = (*RATIO, *CLIPPING, *TRUST, *KL, *ENTROPY, *REDUCTION)
