//! Typed fields out of a request's JSON, with complaints that name the field.
//!
//! Decision: read by hand rather than derived, as conversations are, because OpenAI's errors carry
//! `param` and a person wants to know which of forty content parts is wrong. Null is the same as absent,
//! as OpenAI has it. Fields that nobody asks for are ignored.
//!
//! Refuses: text that is no JSON, and JSON of more values than a request can need (each takes many times
//! its length in memory).

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{ApiError, ApiResult};

/// Most numbers, texts, lists and objects in one request.
const MAX_VALUES: usize = 200_000;

/// Reads a body.
pub fn parse(bytes: &[u8]) -> ApiResult<Value> {
    let mut inside = false;
    let mut escaped = false;
    let mut values = 0;
    for byte in bytes {
        match (inside, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => inside = !inside,
            (false, b',' | b'[' | b'{') => values += 1,
            _ => {}
        }
    }
    if values > MAX_VALUES {
        return Err(ApiError::bad(format!(
            "the body has more than {MAX_VALUES} values, which no request needs: send less"
        )));
    }
    serde_json::from_slice(bytes).map_err(|cause| {
        ApiError::bad(format!("the body is not valid JSON ({cause})")).code("invalid_json")
    })
}

/// What a value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value of the wrong type.
fn wrong(param: &str, wanted: &str, value: &Value) -> ApiError {
    let message = format!("{param} must be {wanted}, but it is {}", kind(value));
    ApiError::invalid(param, message).code("invalid_type")
}

/// One object of a request.
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    /// The object at `path` (empty for the body itself).
    pub fn new(value: &'a Value, path: &str) -> ApiResult<Self> {
        match value {
            Value::Object(object) => Ok(Self {
                object,
                path: path.to_owned(),
            }),
            other if path.is_empty() => Err(ApiError::bad(format!(
                "the body must be a JSON object, but it is {}",
                kind(other)
            ))),
            other => Err(wrong(path, "an object", other)),
        }
    }

    /// Where a field stands.
    pub fn at(&self, key: &str) -> String {
        match self.path.as_str() {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        }
    }

    /// A field that is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> ApiResult<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, key: &str) -> ApiResult<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list.
    pub fn list(&self, key: &str) -> ApiResult<Option<&'a Vec<Value>>> {
        self.typed(key, "a list", Value::as_array)
    }

    /// A whole number within bounds.
    pub fn integer(&self, key: &str, range: RangeInclusive<i64>) -> ApiResult<Option<i64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let param = self.at(key);
        let number = match value {
            Value::Number(number) => number.as_i64().or_else(|| {
                let whole = number.as_f64().filter(|x| x.fract() == 0.0)?;
                Some(whole.clamp(-9e18, 9e18) as i64)
            }),
            other => return Err(wrong(&param, "a whole number", other)),
        };
        match number {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(_) => Err(ApiError::invalid(
                &param,
                format!(
                    "{param} is {value}; it must be from {} to {}",
                    range.start(),
                    range.end()
                ),
            )),
            None => Err(ApiError::invalid(
                &param,
                format!("{param} is {value}; it must be a whole number"),
            )),
        }
    }

    /// A number within bounds.
    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> ApiResult<Option<f64>> {
        let number = self.typed(key, "a number", Value::as_f64)?;
        match number {
            Some(x) if !range.contains(&x) => {
                let param = self.at(key);
                let message = format!(
                    "{param} is {x}; it must be from {} to {}",
                    range.start(),
                    range.end()
                );
                Err(ApiError::invalid(param, message))
            }
            number => Ok(number),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> ApiResult<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(wrong(&self.at(key), wanted, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Fields, MAX_VALUES, parse};

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let value = json!({"a": "x", "n": 7, "half": 0.5, "none": null, "big": 1e300});
        let fields = Fields::new(&value, "outer[1]").expect("an object");
        assert_eq!(fields.flag("none"), Ok(None));
        assert_eq!(fields.integer("n", 0..=9), Ok(Some(7)));
        for (result, words) in [
            (fields.integer("a", 0..=9).map(|_| ()), "a whole number"),
            (fields.integer("n", 0..=6).map(|_| ()), "from 0 to 6"),
            (fields.integer("half", 0..=6).map(|_| ()), "whole"),
            (fields.integer("big", 0..=6).map(|_| ()), "from 0 to 6"),
            (fields.flag("n").map(|_| ()), "true or false"),
            (fields.number("n", 0.0..=1.0).map(|_| ()), "from 0 to 1"),
        ] {
            let error = result.expect_err(words);
            assert!(error.message.contains(words), "{}", error.message);
            let param = error.param.expect("a place");
            assert!(param.starts_with("outer[1]."), "{param}");
        }
    }

    #[test]
    fn a_body_of_too_many_values_is_refused_before_it_is_read() {
        let many = format!("[{}0]", "0,".repeat(MAX_VALUES + 1));
        assert!(parse(many.as_bytes()).is_err());
        // Commas within a text are no values.
        let text = format!("\"\\\"{}\"", ",".repeat(MAX_VALUES + 1));
        assert!(parse(text.as_bytes()).is_ok());
        assert!(parse(b"{\"a\": ").is_err());
        assert!(parse(b"\xff").is_err());
    }
}
