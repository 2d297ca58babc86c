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
        Self {
            id: format!("{prefix}-{}", random_id()),
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

/// 32 digits that nobody has seen yet.
pub(crate) fn random_id() -> String {
    // Each of the standard library's hash keys is new and starts from the system's randomness.
    let half = || RandomState::new().hash_one(0);
    format!("{:016x}{:016x}", half(), half())
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
