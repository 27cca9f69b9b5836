//! What a bench has measured: samples, tables, and both as Markdown and JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::machine::Conditions;

/// Measured values of one figure, all in one unit.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was measured.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value that this share (0 to 1) of all values does not exceed; 0 for none. With few
    /// samples the 99th percentile is the largest of them.
    #[must_use]
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        let last = sorted.len().saturating_sub(1);
        sorted
            .get(rank.saturating_sub(1).min(last))
            .copied()
            .unwrap_or(0.0)
    }

    /// The median.
    #[must_use]
    pub fn p50(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The largest.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }
}

/// A figure that is compared with a goal: at most (or at least) so much.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

impl Goal {
    fn text(self) -> String {
        match self {
            Self::AtMost(limit) => format!("≤ {}", number(limit)),
            Self::AtLeast(limit) => format!("≥ {}", number(limit)),
        }
    }

    /// Whether `value` is good enough.
    #[must_use]
    pub fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

/// One part of the report: a table with what the machine did meanwhile.
#[derive(Debug)]
pub struct Section {
    title: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
    figures: serde_json::Map<String, Value>,
    conditions: Option<Conditions>,
}

impl Section {
    /// An empty table with these columns.
    #[must_use]
    pub fn new(title: &str, header: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            header: header.iter().map(|&column| column.to_owned()).collect(),
            rows: Vec::new(),
            notes: Vec::new(),
            figures: serde_json::Map::new(),
            conditions: None,
        }
    }

    /// A table of figures: median, 99th percentile, largest, how many, and the goal.
    #[must_use]
    pub fn of_figures(title: &str) -> Self {
        Self::new(title, &["", "p50", "p99", "max", "n", "goal (p50)"])
    }

    /// A line of a table that [`Section::of_figures`] made.
    pub fn figure(&mut self, name: &str, samples: &Samples, goal: Option<Goal>) {
        let goal_text = goal.map_or_else(String::new, |goal| {
            let met = if goal.met(samples.p50()) {
                "met"
            } else {
                "not met"
            };
            format!("{}: {met}", goal.text())
        });
        self.row(vec![
            name.to_owned(),
            number(samples.p50()),
            number(samples.quantile(0.99)),
            number(samples.max()),
            samples.len().to_string(),
            goal_text,
        ]);
        self.value(
            name,
            json!({
                "p50": samples.p50(), "p99": samples.quantile(0.99), "max": samples.max(),
                "samples": samples.0,
            }),
        );
    }

    /// A line.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// For the JSON file only.
    pub fn value(&mut self, name: &str, value: Value) {
        self.figures.insert(name.to_owned(), value);
    }

    /// A sentence below the table.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// What the machine did while this was measured.
    pub fn under(&mut self, conditions: Conditions) {
        self.conditions = Some(conditions);
    }

    fn markdown(&self) -> String {
        let mut text = format!("### {}\n\n", self.title);
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        if !self.rows.is_empty() {
            text += &line(&self.header);
            text += &line(&vec!["---".to_owned(); self.header.len()]);
            for row in &self.rows {
                text += &line(row);
            }
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "{note}\n");
        }
        if let Some(conditions) = &self.conditions {
            let _ = writeln!(text, "{conditions}\n");
        }
        text
    }
}

/// All that was measured.
#[derive(Debug, Default)]
pub struct Report {
    heading: String,
    sections: Vec<Section>,
}

impl Report {
    /// An empty report; `heading` says of what, on which machine.
    #[must_use]
    pub fn new(heading: String) -> Self {
        Self {
            heading,
            sections: Vec::new(),
        }
    }

    /// Adds a section and prints it at once, so that an interrupted run is not for nothing.
    pub fn add(&mut self, section: Section) {
        println!("{}", section.markdown());
        self.sections.push(section);
    }

    /// All sections.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!("{}\n\n", self.heading);
        for section in &self.sections {
            text += &section.markdown();
        }
        text
    }

    /// Every sample, by section and name.
    #[must_use]
    pub fn json(&self) -> Value {
        let sections: serde_json::Map<String, Value> = self
            .sections
            .iter()
            .map(|section| {
                let value = json!({
                    "figures": section.figures,
                    "notes": section.notes,
                    "machine": section.conditions.as_ref().map(Conditions::json),
                });
                (section.title.clone(), value)
            })
            .collect();
        json!({ "heading": self.heading, "sections": sections })
    }
}

/// Three digits that matter, as people write them.
#[must_use]
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v == 0.0 || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = match text.split_once('.') {
        Some((whole, rest)) => (whole, Some(rest)),
        None => (text.as_str(), None),
    };
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 && digit.is_ascii_digit() && whole.len() > 4
        {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    match rest {
        Some(rest) => format!("{grouped}.{rest}"),
        None => grouped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_samples_themselves() {
        let mut samples = Samples::default();
        assert_eq!(samples.p50(), 0.0);
        for value in [4.0, 1.0, 3.0, 2.0] {
            samples.push(value);
        }
        assert_eq!((samples.p50(), samples.max()), (2.0, 4.0));
        assert_eq!(samples.quantile(0.99), 4.0);
    }

    #[test]
    fn numbers_have_three_digits_that_matter() {
        for (value, text) in [
            (0.0, "0"),
            (0.3214, "0.321"),
            (2.345, "2.35"),
            (23.45, "23.4"),
            (5300.4, "5300"),
            (19530.0, "19,530"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_goal_is_met_or_not() {
        assert!(Goal::AtMost(0.6).met(0.6) && !Goal::AtMost(0.6).met(0.61));
        assert!(Goal::AtLeast(2.5).met(2.5) && !Goal::AtLeast(2.5).met(2.4));
    }
}
