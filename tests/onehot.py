"""The author's distribution over discrete actions, which RoboSuite has no use for and the recordings need."""

from torch import Tensor
from torch.nn import functional as F

from actor import DISTRIBUTIONS, ActionDistribution
from networks import Draws


class OneHot(ActionDistribution):
    """One of A discrete actions as a one-hot vector, with straight-through gradients."""

    layers = ("out",)

    def __init__(self, logit: Tensor):
        self.logit = logit.float()

    @property
    def mode(self) -> Tensor:
        return F.one_hot(self.logit.argmax(-1), self.logit.shape[-1]).to(self.logit.dtype)

    mean = mode  # an action is one of them, not a mixture

    def rsample(self, draws: Draws) -> Tensor:
        probs = self.logit.softmax(-1)
        return draws.onehot(probs.detach()) + (probs - probs.detach())

    def log_prob(self, action: Tensor) -> Tensor:
        return (action.detach() * self.logit.log_softmax(-1)).sum(-1)

    def entropy(self, draws: Draws) -> Tensor:
        logp = self.logit.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)


DISTRIBUTIONS["onehot"] = OneHot
