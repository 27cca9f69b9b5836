//! Lists: a table by default; `--format json`, a template, or `table …`; IDs with `--quiet`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::template::Template;
use super::{line, print};
use crate::failure::{Failure, Result};

/// How a list is shown.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Format {
    /// Only display IDs
    #[arg(short, long)]
    pub quiet: bool,
    /// Format output: 'table', 'table TEMPLATE', 'json', or a Go template
    #[arg(long)]
    pub format: Option<String>,
}

/// The columns of a kind of list: field, header.
pub type Columns = &'static [(&'static str, &'static str)];

/// One row: fields by name; those of the columns and perhaps more.
#[derive(Clone, Debug)]
pub struct Row {
    fields: Map<String, Value>,
    labels: BTreeMap<String, String>,
}

impl Row {
    /// A row of text fields.
    pub fn new<const N: usize>(fields: [(&str, String); N]) -> Self {
        Self {
            fields: fields
                .into_iter()
                .map(|(name, value)| (name.to_owned(), Value::String(value)))
                .collect(),
            labels: BTreeMap::new(),
        }
    }

    /// With the object's labels: `Labels` as text, and for `.Label "key"`.
    pub fn with_labels(mut self, labels: BTreeMap<String, String>) -> Self {
        let text: Vec<_> = labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        self.fields
            .insert("Labels".to_owned(), text.join(",").into());
        self.labels = labels;
        self
    }

    /// With a field that is no text.
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.fields.insert(name.to_owned(), value);
        self
    }

    fn text(&self, name: &str) -> &str {
        self.fields.get(name).and_then(Value::as_str).unwrap_or("")
    }

    fn template_data(&self) -> Value {
        let mut data = self.fields.clone();
        data.insert("_labels".to_owned(), serde_json::json!(self.labels));
        Value::Object(data)
    }
}

/// Prints rows in the format asked for. In a table, `shown` may change a cell (the star of `node ls`).
pub fn show(format: &Format, columns: Columns, rows: &[Row]) -> Result {
    print(&render(format, columns, rows).map_err(Failure::Plain)?)
}

/// The text of a list.
pub fn render(
    format: &Format,
    columns: Columns,
    rows: &[Row],
) -> std::result::Result<String, String> {
    if format.quiet {
        return Ok(rows
            .iter()
            .map(|row| format!("{}\n", row.text("ID")))
            .collect());
    }
    match format.format.as_deref() {
        None | Some("" | "table") => {
            let header = columns
                .iter()
                .map(|(_, header)| (*header).to_owned())
                .collect();
            let cells = rows.iter().map(|row| {
                columns
                    .iter()
                    .map(|(field, _)| {
                        let mark = match row.fields.get("Self") {
                            Some(Value::Bool(true)) if *field == "ID" => " *",
                            Some(_) if *field == "ID" => "  ",
                            _ => "",
                        };
                        format!("{}{mark}", row.text(field))
                    })
                    .collect()
            });
            Ok(table(std::iter::once(header).chain(cells).collect()))
        }
        Some("json") => Ok(rows
            .iter()
            .map(|row| format!("{}\n", Value::Object(row.fields.clone())))
            .collect()),
        Some(text) => match text.strip_prefix("table ") {
            Some(text) => {
                let template = Template::parse(text, true)?;
                let name = |field: &str| {
                    columns
                        .iter()
                        .find(|(column, _)| *column == field)
                        .map_or_else(|| field.to_uppercase(), |(_, header)| (*header).to_owned())
                };
                let mut lines = vec![template.header(&name)];
                for row in rows {
                    lines.push(template.render(&row.template_data())?);
                }
                let cells = |line: &String| line.split('\t').map(str::to_owned).collect();
                Ok(table(lines.iter().map(cells).collect()))
            }
            None => {
                let template = Template::parse(text, true)?;
                rows.iter()
                    .map(|row| Ok(format!("{}\n", template.render(&row.template_data())?)))
                    .collect()
            }
        },
    }
}

/// Columns aligned to the left, three spaces between them.
pub fn table(rows: Vec<Vec<String>>) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in &rows {
        for (place, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(place) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (place, cell) in row.iter().enumerate() {
            line.push_str(cell);
            if place + 1 < row.len() {
                let fill = widths[place] - cell.chars().count() + 3;
                line.push_str(&" ".repeat(fill));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Prints what `inspect` found: a JSON array indented by four spaces, or a
/// template's text for each object. Then the sentences about what was not found.
pub fn inspected(format: Option<&str>, found: &[Value], missing: &[String]) -> Result {
    match format {
        None | Some("" | "json") => {
            let objects = Value::Array(found.to_vec());
            line(&if format == Some("json") {
                objects.to_string()
            } else {
                indented(&objects)
            })?;
        }
        Some(text) => {
            let template = Template::parse(text, false).map_err(Failure::Plain)?;
            for object in found {
                line(&template.render(object).map_err(Failure::Plain)?)?;
            }
        }
    }
    finish(missing)
}

/// Ends with exit status 1 if there is something to say.
pub fn finish(errors: &[String]) -> Result {
    for error in errors {
        super::warn(error);
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(Failure::Exit(1))
    }
}

fn indented(value: &Value) -> String {
    use serde::Serialize as _;
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: Columns = &[("ID", "ID"), ("Name", "NAME")];

    fn rows() -> Vec<Row> {
        let row =
            |id: &str, name: &str| Row::new([("ID", id.to_owned()), ("Name", name.to_owned())]);
        vec![
            row("a", "web").with_labels(BTreeMap::from([("k".to_owned(), "v".to_owned())])),
            row("bcd", "db"),
        ]
    }

    fn with(format: &str) -> String {
        let format = Format {
            quiet: false,
            format: Some(format.to_owned()),
        };
        render(&format, COLUMNS, &rows()).unwrap()
    }

    #[test]
    fn a_table_has_three_spaces_between_columns() {
        let text = render(&Format::default(), COLUMNS, &rows()).unwrap();
        assert_eq!(text, "ID    NAME\na     web\nbcd   db\n");
        assert_eq!(
            render(&Format::default(), COLUMNS, &[]).unwrap(),
            "ID   NAME\n"
        );
    }

    #[test]
    fn formats_are_json_templates_and_tables_of_templates() {
        assert_eq!(with("{{.Name}}/{{.ID}}"), "web/a\ndb/bcd\n");
        assert_eq!(
            with("table {{.Name}}\\t{{.ID}}"),
            "NAME   ID\nweb    a\ndb     bcd\n"
        );
        assert_eq!(
            with("json").lines().next(),
            Some(r#"{"ID":"a","Name":"web","Labels":"k=v"}"#)
        );
        assert_eq!(with("{{.Label \"k\"}}"), "v\n\n");
    }

    #[test]
    fn quiet_is_ids_only() {
        let format = Format {
            quiet: true,
            format: None,
        };
        assert_eq!(render(&format, COLUMNS, &rows()).unwrap(), "a\nbcd\n");
    }

    #[test]
    fn the_node_asked_has_a_star() {
        let row = |id: &str, own| {
            Row::new([("ID", id.to_owned()), ("Name", "n".to_owned())])
                .with("Self", Value::Bool(own))
        };
        let text = render(
            &Format::default(),
            COLUMNS,
            &[row("a", true), row("b", false)],
        )
        .unwrap();
        assert_eq!(text, "ID    NAME\na *   n\nb     n\n");
    }

    #[test]
    fn inspect_indents_by_four() {
        assert_eq!(
            indented(&serde_json::json!([{"B": 1, "A": []}])),
            "[\n    {\n        \"B\": 1,\n        \"A\": []\n    }\n]"
        );
        assert_eq!(indented(&serde_json::json!([])), "[]");
    }
}
