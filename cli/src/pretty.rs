//! `inspect --pretty`: a label, tabs, a value. Pure.

use std::collections::BTreeMap;

/// Text that grows line by line.
#[derive(Debug, Default)]
pub struct Pretty(String);

impl Pretty {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// `Label:<TAB>value`
    pub fn put(&mut self, label: &str, value: &str) {
        let tabs = if label.len() < 7 { "\t\t" } else { "\t" };
        self.raw(&format!("{label}:{tabs}{value}\n"));
    }

    /// A label that lines below belong to.
    pub fn head(&mut self, label: &str) {
        self.raw(&format!("{label}:\n"));
    }

    /// A line below a head.
    pub fn indented(&mut self, label: &str, value: &str) {
        let tabs = if label.trim_start().len() < 6 {
            "\t\t"
        } else {
            "\t"
        };
        let line = match label.strip_prefix('\t') {
            Some(label) => format!("  {label}:{tabs}{value}\n"),
            None => format!(" {label}:{tabs}{value}\n"),
        };
        self.raw(&line);
    }

    /// A line below a head, unless it has no value.
    pub fn indented_some(&mut self, label: &str, value: &str) {
        if !value.is_empty() {
            self.indented(label, value);
        }
    }

    /// Labels, unless there are none.
    pub fn labels(&mut self, label: &str, labels: &BTreeMap<String, String>) {
        if labels.is_empty() {
            return;
        }
        self.head(label);
        for (key, value) in labels {
            self.raw(&format!(" - {key}={value}\n"));
        }
    }

    /// Text as it is.
    pub fn raw(&mut self, text: &str) {
        self.0.push_str(text);
    }

    /// The whole.
    pub fn done(self) -> String {
        self.0
    }
}
