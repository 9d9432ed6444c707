//! Event patterns, as far as the tests need them: values, `prefix`, `anything-but`, `exists`, nested.

use serde_json::{Map, Value};

#[derive(Debug)]
pub(super) struct Pattern {
    pub(super) text: String,
    fields: Map<String, Value>,
}

impl Pattern {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|_| "it is no JSON object".to_owned())?;
        check(&fields)?;
        Ok(Self { text: text.to_owned(), fields })
    }

    /// `found` gives the event's field of a name.
    pub(super) fn matches(&self, found: impl Fn(&str) -> Option<Value>) -> bool {
        self.fields.iter().all(|(name, expected)| matches(expected, found(name).as_ref()))
    }
}

fn check(fields: &Map<String, Value>) -> Result<(), String> {
    if fields.is_empty() {
        return Err("it is empty".to_owned());
    }
    for (name, value) in fields {
        match value {
            Value::Object(inner) => check(inner)?,
            Value::Array(any) if !any.is_empty() => any.iter().try_for_each(check_one)?,
            _ => return Err(format!("\"{name}\" must be an object or an array")),
        }
    }
    Ok(())
}

fn check_one(expected: &Value) -> Result<(), String> {
    let Value::Object(operator) = expected else { return Ok(()) };
    match operator.iter().next() {
        Some((name, Value::String(_))) if name == "prefix" => Ok(()),
        Some((name, Value::Bool(_))) if name == "exists" => Ok(()),
        Some((name, _)) if name == "anything-but" => Ok(()),
        other => Err(format!("the fake does not know {other:?}")),
    }
}

fn matches(expected: &Value, found: Option<&Value>) -> bool {
    match (expected, found) {
        (Value::Object(inner), Some(Value::Object(found))) => {
            inner.iter().all(|(name, expected)| matches(expected, found.get(name)))
        }
        (Value::Array(any), found) => any.iter().any(|expected| matches_one(expected, found)),
        _ => false,
    }
}

/// An array in the event matches where one of its values does.
fn matches_one(expected: &Value, found: Option<&Value>) -> bool {
    let has = |wanted: &Value| match found {
        Some(Value::Array(values)) => values.contains(wanted),
        found => found == Some(wanted),
    };
    let Value::Object(operator) = expected else { return has(expected) };
    if let Some(exists) = operator.get("exists") {
        return *exists == found.is_some();
    }
    if let Some(prefix) = operator.get("prefix").and_then(Value::as_str) {
        return found.and_then(Value::as_str).is_some_and(|text| text.starts_with(prefix));
    }
    match operator.get("anything-but") {
        Some(Value::Array(none)) => found.is_some() && !none.iter().any(has),
        Some(one) => found.is_some() && !has(one),
        None => false,
    }
}
