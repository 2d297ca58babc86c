//! The fields of a request, taken one by one, so that what is left over is known to be unknown.

use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// A JSON object. `null` is as good as unset, as OpenAI's clients send it.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// # Errors
    /// 400 for what is not a JSON object in UTF-8.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let refuse = |why: String| {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                format!("the body is not a JSON object: {why}"),
            )
            .with_code("invalid_json")
        };
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(refuse("it is JSON of another kind".to_owned())),
            Err(error) => Err(refuse(error.to_string())),
        }
    }

    /// Takes the field `key` out.
    ///
    /// # Errors
    /// 400 naming the place within the field that is not a `T`.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, ApiError> {
        match self.0.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(key, value).map(Some),
        }
    }

    /// Takes a field that must be there.
    ///
    /// # Errors
    /// As [`Self::take`], and 400 if it is unset.
    pub(crate) fn require<T: DeserializeOwned>(&mut self, key: &str) -> Result<T, ApiError> {
        self.take(key)?.ok_or_else(|| {
            ApiError::invalid(key, format!("{key} is missing"))
                .with_code("missing_required_parameter")
        })
    }

    /// Takes a string or a list of them.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(crate) fn take_strings(&mut self, key: &str) -> Result<Vec<String>, ApiError> {
        match self.take(key)? {
            None => Ok(Vec::new()),
            Some(Value::String(one)) => Ok(vec![one]),
            Some(many) => read(key, many),
        }
    }

    /// Takes fields that say something about the caller and nothing about the answer.
    pub(crate) fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.0.remove(*key);
        }
    }

    /// Refuses a field of OpenAI's that is not served here, unless it asks for what happens anyway.
    ///
    /// # Errors
    /// 400 with the code `unsupported`.
    pub(crate) fn refuse(&mut self, key: &str, harmless: &[Value]) -> Result<(), ApiError> {
        match self.0.remove(key) {
            Some(value) if !value.is_null() && !harmless.contains(&value) => Err(
                ApiError::unsupported(key, format!("{key} is not supported by this server")),
            ),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// 400 naming a field that nothing took.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            Some(key) => Err(ApiError::invalid(
                key.as_str(),
                format!("unrecognized request argument: {key}"),
            )
            .with_code("unknown_parameter")),
            None => Ok(()),
        }
    }
}

/// `value` as a `T`.
///
/// # Errors
/// 400 naming `key` and the place within it.
pub(crate) fn read<T: DeserializeOwned>(key: &str, value: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let param = match path.as_str() {
            "." => key.to_owned(),
            path if path.starts_with('[') => format!("{key}{path}"),
            path => format!("{key}.{path}"),
        };
        let why = error.into_inner();
        ApiError::invalid(param.as_str(), format!("{param}: {why}")).with_code("invalid_type")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    fn param(error: &ApiError) -> Value {
        error.to_json()["error"]["param"].clone()
    }

    #[test]
    fn null_is_unset_and_what_nothing_takes_is_named() {
        let mut fields = fields(&json!({"n": null, "seed": 3, "user": "me", "colour": "red"}));
        assert_eq!(fields.take::<u32>("n").unwrap(), None);
        assert_eq!(fields.take::<u32>("seed").unwrap(), Some(3));
        fields.ignore(&["user"]);
        assert_eq!(param(&fields.finish().unwrap_err()), "colour");
    }

    #[test]
    fn the_place_within_a_field_is_named() {
        let mut fields = fields(&json!({"n": -1, "input": ["a", 1], "bias": {"7": "x"}}));
        assert_eq!(param(&fields.take::<u32>("n").unwrap_err()), "n");
        assert_eq!(
            param(&fields.take_strings("input").unwrap_err()),
            "input[1]"
        );
        let bias = fields.take::<std::collections::BTreeMap<String, f32>>("bias");
        assert_eq!(param(&bias.unwrap_err()), "bias.7");
    }

    #[test]
    fn a_field_that_asks_for_what_happens_anyway_is_not_refused() {
        let mut fields =
            fields(&json!({"store": false, "audio": {"voice": "x"}, "prediction": null}));
        fields.refuse("store", &[json!(false)]).unwrap();
        fields.refuse("prediction", &[]).unwrap();
        assert_eq!(param(&fields.refuse("audio", &[]).unwrap_err()), "audio");
    }

    #[test]
    fn what_is_no_json_object_is_refused() {
        let deep = "[".repeat(100_000);
        for body in [
            b"".as_slice(),
            b"{",
            b"[]",
            b"7",
            b"{\"a\": NaN}",
            b"{\"a\": 1e999}",
            b"{\"a\": \"\xff\"}",
            b"{\"a\": \"\\ud800\"}",
            deep.as_bytes(),
        ] {
            let error = Fields::parse(body).unwrap_err().to_json();
            assert_eq!(error["error"]["code"], "invalid_json");
        }
    }
}
