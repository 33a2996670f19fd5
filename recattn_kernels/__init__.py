"""Fused recurrent and attention kernels for PyTorch, each with a plain-PyTorch reference beside it."""

from recattn_kernels.backends import BackendUnavailableError, explain, use_backend
from recattn_kernels.layers.additive_attention import AdditiveAttention, AttentionLSTMCell
from recattn_kernels.layers.gated import GRU, LSTM, RNN
from recattn_kernels.layers.gated_cell import GRUCell, LSTMCell, RNNCell
from recattn_kernels.layers.glimpse import GlimpseNetwork, GlimpseSensor
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell
from recattn_kernels.layers.patch import PatchReport, patch_model, unpatch_model
from recattn_kernels.layers.recurrent_attention import RecurrentAttention, reinforce_loss
from recattn_kernels.layers.slot_attention import SlotAttention
from recattn_kernels.ops.additive_attention import additive_attention
from recattn_kernels.ops.glimpse import glimpse
from recattn_kernels.ops.gru import gru
from recattn_kernels.ops.gru_step import gru_step
from recattn_kernels.ops.indrnn import indrnn
from recattn_kernels.ops.lstm import lstm
from recattn_kernels.ops.lstm_step import lstm_step
from recattn_kernels.ops.rnn import rnn
from recattn_kernels.ops.slot_attention import slot_attention

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionLSTMCell",
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
    "SlotAttention",
    "additive_attention",
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
    "slot_attention",
    "unpatch_model",
    "use_backend",
]
