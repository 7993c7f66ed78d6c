//! What a client goes through. Knows nothing of the controller: they meet at the [`gate`].

pub mod gate;
