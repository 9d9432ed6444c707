//! What is wrong with a request, field by field, and the limits that several fields share.

/// One bad field: its proto path and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub field: String,
    pub description: String,
}

impl Violation {
    pub fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self { field: field.into(), description: description.into() }
    }
}

/// Collects every violation of a request, so that a caller sees them all at once.
#[derive(Debug, Default)]
pub struct Violations(Vec<Violation>);

/// Ids that callers give: reservation, user.
pub const NAME_CHARS: usize = 128;
/// Strings without a limit of their own.
pub const TEXT_CHARS: usize = 255;

impl Violations {
    pub fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation::new(field, description));
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn into_result(self) -> Result<(), Vec<Violation>> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0) }
    }

    /// 1 to 128 characters without control characters.
    pub fn name(&mut self, field: &str, value: &str) {
        if value.is_empty() {
            self.add(field, format!("is required: 1 to {NAME_CHARS} characters"));
            return;
        }
        self.text(field, value, NAME_CHARS);
        if let Some(at) = value.chars().take(NAME_CHARS).position(char::is_control) {
            self.add(field, format!("has a control character at position {at}; none is allowed"));
        }
    }

    /// At most `max` characters; may be empty.
    pub fn text(&mut self, field: impl Into<String>, value: &str, max: usize) {
        // No character is shorter than a byte: most values need not be counted.
        let chars = if value.len() <= max { 0 } else { value.chars().count() };
        if chars > max {
            self.add(field, format!("has {chars} characters; at most {max} are allowed"));
        }
    }

    pub fn into_vec(self) -> Vec<Violation> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bad_field_is_named() {
        let mut found = Violations::default();
        found.name("a", "");
        found.name("b", &"x".repeat(NAME_CHARS + 1));
        found.name("c", "tab\there");
        found.text("e", "tab\there", TEXT_CHARS);
        found.name("d", &"é".repeat(NAME_CHARS));
        let fields: Vec<_> =
            found.into_result().unwrap_err().into_iter().map(|v| v.field).collect();
        assert_eq!(fields, ["a", "b", "c"]);
    }
}
