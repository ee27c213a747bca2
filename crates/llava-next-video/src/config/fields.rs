//! Reading typed fields out of a JSON object, with the file and the full key in every complaint.
//!
//! A missing key or `null` gives the default, as in Transformers' configuration classes; a value of the
//! wrong type or out of bounds is refused rather than bent.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// One JSON object and where it stands.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    /// The file, for messages.
    pub file: &'a str,
    /// Dotted path of the object within the file; empty for the top.
    pub path: &'a str,
    /// The object.
    pub map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The top object of `value`.
    pub fn new(file: &'a str, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self {
                file,
                path: "",
                map,
            }),
            other => Err(Error::Config(format!(
                "{file} holds {} where a JSON object is expected",
                kind(other)
            ))),
        }
    }

    /// The value of `key`, `null` counting as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The object under `key`; `path` is its dotted path.
    pub fn object(&self, key: &str, path: &'a str) -> Result<Option<Fields<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                file: self.file,
                path,
                map,
            })),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }

    /// A whole number within `bounds`.
    pub fn size(&self, key: &str, default: usize, bounds: RangeInclusive<usize>) -> Result<usize> {
        Ok(self.optional_size(key, bounds)?.unwrap_or(default))
    }

    /// A whole number within `bounds`, if there is one.
    pub fn optional_size(&self, key: &str, bounds: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let (low, high) = (*bounds.start(), *bounds.end());
        match whole(value) {
            Some(n) if bounds.contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, value, &format!("a whole number from {low} to {high}"))),
        }
    }

    /// A finite number.
    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    /// A finite number, if there is one.
    pub fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.wrong(key, value, "a number")),
        }
    }

    /// A number above zero.
    pub fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let x = self.number(key, default)?;
        if x > 0.0 {
            return Ok(x);
        }
        Err(self.complain(key, &format!("is {x}; it must be a number above 0")))
    }

    /// `true` or `false`.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// A string, if there is one.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    /// A list of finite numbers, if there is one.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let list = value
            .as_array()
            .and_then(|l| l.iter().map(Value::as_f64).collect());
        list.map(Some)
            .ok_or_else(|| self.wrong(key, value, "a list of numbers"))
    }

    /// One id or a list of ids; an empty list where there is none.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            // Published files write -1 for "none".
            other if other.as_i64().is_some_and(|n| n < 0) => Some(Vec::new()),
            other => one(other).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, value, "a token id or a list of token ids"))
    }

    /// The error for a value of the wrong kind.
    pub fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        self.complain(
            key,
            &format!("is {}; it must be {expected}", shorten(value)),
        )
    }

    /// An error about `key`, with file and path.
    pub fn complain(&self, key: &str, what: &str) -> Error {
        let dot = if self.path.is_empty() { "" } else { "." };
        Error::Config(format!("{}: {}{dot}{key} {what}", self.file, self.path))
    }
}

/// A non-negative whole number, also one written as `24.0`.
pub(crate) fn whole(value: &Value) -> Option<usize> {
    if let Some(n) = value.as_u64() {
        return usize::try_from(n).ok();
    }
    let x = value.as_f64()?;
    (x >= 0.0 && x.fract() == 0.0 && x < 2f64.powi(53)).then_some(x as usize)
}

/// What a JSON value is, for a message.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The value as JSON, cut short: a message is one sentence.
fn shorten(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
