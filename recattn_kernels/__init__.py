"""Fused recurrent and attention kernels for PyTorch, each with a plain-PyTorch reference beside it."""

from recattn_kernels.backends import BackendUnavailableError, explain, use_backend
from recattn_kernels.layers.gated import GRU, LSTM, RNN
from recattn_kernels.layers.gated_cell import GRUCell, LSTMCell, RNNCell
from recattn_kernels.layers.glimpse import GlimpseNetwork, GlimpseSensor
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell
from recattn_kernels.layers.patch import PatchReport, patch_model, unpatch_model
from recattn_kernels.layers.recurrent_attention import RecurrentAttention, reinforce_loss
from recattn_kernels.ops.glimpse import glimpse
from recattn_kernels.ops.gru import gru
from recattn_kernels.ops.gru_step import gru_step
from recattn_kernels.ops.indrnn import indrnn
from recattn_kernels.ops.lstm import lstm
from recattn_kernels.ops.lstm_step import lstm_step
from recattn_kernels.ops.rnn import rnn

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendUnavailableError",
    "GRUCell",
    "GlimpseNetwork",
    "GlimpseSensor",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "PatchReport",
    "RNNCell",
    "RecurrentAttention",
    "explain",
    "glimpse",
    "gru",
    "gru_step",
    "indrnn",
    "lstm",
    "lstm_step",
    "patch_model",
    "reinforce_loss",
    "rnn",
    "unpatch_model",
    "use_backend",
]
