"""What rnn, lstm and gru share: a call, its checks, its registered ops and its derivative. They differ in the cell."""
