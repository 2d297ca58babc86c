//! What every answer begins with: its id, when, and by which model.

use std::hash::{BuildHasher, RandomState};

use serde_json::{Value, json};

use crate::state::now;

/// The head of one answer and of all its chunks.
pub(crate) struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    /// `prefix`: OpenAI's for the endpoint, such as `chatcmpl`.
    pub(crate) fn new(prefix: &str, model: &str) -> Self {
        // Each of the standard library's hash keys is new and starts from the system's randomness.
        let (high, low) = (
            RandomState::new().hash_one(0),
            RandomState::new().hash_one(1),
        );
        Self {
            id: format!("{prefix}-{high:016x}{low:016x}"),
            created: now(),
            model: model.to_owned(),
        }
    }

    /// The head with the choices below it.
    pub(crate) fn to_json(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("qwen2-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_answers_have_the_same_id() {
        let ids = (0..1000).map(|_| Head::new("x", "m").id);
        assert_eq!(ids.collect::<std::collections::HashSet<_>>().len(), 1000);
    }
}
