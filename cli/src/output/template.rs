//! The part of Go's templates that people use with `--format`:
//! `{{.A.B}}`, `{{json .}}`, `{{.A | upper}}`, `{{join .L ","}}`, `{{.Label "k"}}`,
//! `{{range .L}}…{{end}}`, `{{if .A}}…{{else}}…{{end}}`. Pure.

use serde_json::Value;

/// A parsed template.
#[derive(Debug)]
pub struct Template {
    nodes: Vec<Node>,
    strict: bool,
}

#[derive(Debug)]
enum Node {
    Text(String),
    Show(Pipeline),
    Range(Pipeline, Vec<Node>, Vec<Node>),
    If(Pipeline, Vec<Node>, Vec<Node>),
}

/// Commands, each with its arguments; the result of one is the last argument of the next.
type Pipeline = Vec<Vec<Word>>;

#[derive(Clone, Debug, PartialEq)]
enum Word {
    /// `.` or `.A.B`
    Path(Vec<String>),
    Text(String),
    Number(i64),
    Name(String),
}

/// Nesting of range and if.
const DEPTH_MAX: usize = 16;

impl Template {
    /// Reads a template. `strict`: a field that is not there is an error, as in lists; otherwise
    /// it shows as `<no value>`, as in `inspect`.
    pub fn parse(text: &str, strict: bool) -> Result<Self, String> {
        let unescaped = text.replace("\\t", "\t").replace("\\n", "\n");
        let mut rest = unescaped.as_str();
        let (nodes, end) = block(&mut rest, 0)?;
        match end {
            None => Ok(Self { nodes, strict }),
            Some(end) => Err(format!("template parsing error: unexpected {{{{{end}}}}}")),
        }
    }

    /// The text for one object.
    pub fn render(&self, data: &Value) -> Result<String, String> {
        let mut out = String::new();
        self.run(&self.nodes, data, &mut out)?;
        Ok(out)
    }

    /// The paths at the top level, for the header of `table …`.
    pub fn header(&self, name: &dyn Fn(&str) -> String) -> String {
        self.nodes
            .iter()
            .map(|node| match node {
                Node::Text(text) => text.clone(),
                Node::Show(pipeline) => pipeline
                    .iter()
                    .flatten()
                    .find_map(|word| match word {
                        Word::Path(path) if !path.is_empty() => Some(name(&path[path.len() - 1])),
                        _ => None,
                    })
                    .unwrap_or_default(),
                Node::Range(..) | Node::If(..) => String::new(),
            })
            .collect()
    }

    fn run(&self, nodes: &[Node], dot: &Value, out: &mut String) -> Result<(), String> {
        for node in nodes {
            match node {
                Node::Text(text) => out.push_str(text),
                Node::Show(pipeline) => out.push_str(&show(&self.value(pipeline, dot)?)),
                Node::If(pipeline, yes, no) => {
                    let branch = if truth(&self.value(pipeline, dot)?) {
                        yes
                    } else {
                        no
                    };
                    self.run(branch, dot, out)?;
                }
                Node::Range(pipeline, body, none) => {
                    let items: Vec<Value> = match self.value(pipeline, dot)? {
                        Value::Array(items) => items,
                        Value::Object(map) => map.into_iter().map(|(_, value)| value).collect(),
                        _ => Vec::new(),
                    };
                    if items.is_empty() {
                        self.run(none, dot, out)?;
                    }
                    for item in &items {
                        self.run(body, item, out)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn value(&self, pipeline: &Pipeline, dot: &Value) -> Result<Value, String> {
        let mut piped: Option<Value> = None;
        for command in pipeline {
            let (first, args) = command
                .split_first()
                .ok_or("template parsing error: missing value for command")?;
            let mut values = args
                .iter()
                .map(|word| self.word(word, dot))
                .collect::<Result<Vec<_>, _>>()?;
            values.extend(piped.take());
            piped = Some(match first {
                Word::Name(name) => call(name, &values)?,
                Word::Path(path) if path.last().is_some_and(|last| last == "Label") => {
                    let key = values.first().map(show).unwrap_or_default();
                    dot.get("_labels")
                        .or_else(|| dot.get("Labels"))
                        .and_then(|labels| labels.get(&key))
                        .cloned()
                        .unwrap_or_else(|| Value::String(String::new()))
                }
                other if values.is_empty() => self.word(other, dot)?,
                other => return Err(format!("template: can't give arguments to {other:?}")),
            });
        }
        Ok(piped.unwrap_or(Value::Null))
    }

    fn word(&self, word: &Word, dot: &Value) -> Result<Value, String> {
        Ok(match word {
            Word::Text(text) => Value::String(text.clone()),
            Word::Number(number) => Value::from(*number),
            Word::Name(name) => call(name, &[])?,
            Word::Path(path) => {
                let mut value = dot;
                for field in path {
                    value = match value.get(field) {
                        Some(value) => value,
                        None if self.strict => {
                            return Err(format!(
                                "template: :1: executing \"\" at <.{}>: can't evaluate field {field}",
                                path.join(".")
                            ));
                        }
                        None => return Ok(Value::Null),
                    };
                }
                value.clone()
            }
        })
    }
}

/// Reads until the end or a word that closes a block, which is returned.
fn block(rest: &mut &str, depth: usize) -> Result<(Vec<Node>, Option<&'static str>), String> {
    if depth > DEPTH_MAX {
        return Err("template parsing error: nested too deeply".to_owned());
    }
    let mut nodes = Vec::new();
    loop {
        let Some(open) = rest.find("{{") else {
            nodes.push(Node::Text((*rest).to_owned()));
            *rest = "";
            return Ok((nodes, None));
        };
        nodes.push(Node::Text(rest[..open].to_owned()));
        let inner = &rest[open + 2..];
        let close = inner
            .find("}}")
            .ok_or("template parsing error: unclosed action")?;
        let action = inner[..close].trim();
        *rest = &inner[close + 2..];
        match action {
            "end" => return Ok((nodes, Some("end"))),
            "else" => return Ok((nodes, Some("else"))),
            _ => {}
        }
        let (keyword, argument) = action.split_once(' ').unwrap_or((action, ""));
        if keyword != "range" && keyword != "if" {
            nodes.push(Node::Show(pipeline(action)?));
            continue;
        }
        let condition = pipeline(argument)?;
        let (body, end) = block(rest, depth + 1)?;
        let (other, end) = match end {
            Some("else") => block(rest, depth + 1)?,
            end => (Vec::new(), end),
        };
        if end != Some("end") {
            return Err("template parsing error: unexpected EOF".to_owned());
        }
        nodes.push(if keyword == "range" {
            Node::Range(condition, body, other)
        } else {
            Node::If(condition, body, other)
        });
    }
}

fn pipeline(text: &str) -> Result<Pipeline, String> {
    let mut commands = vec![Vec::new()];
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = match first {
            '|' => {
                commands.push(Vec::new());
                rest = rest[1..].trim_start();
                continue;
            }
            '"' => {
                let end = rest[1..]
                    .find('"')
                    .ok_or("template parsing error: unterminated quoted string")?;
                let word = Word::Text(rest[1..=end].to_owned());
                rest = &rest[end + 2..];
                word
            }
            _ => {
                let end = rest
                    .find(|c: char| c.is_whitespace() || c == '|')
                    .unwrap_or(rest.len());
                let (word, after) = rest.split_at(end);
                rest = after;
                if let Some(path) = word.strip_prefix('.') {
                    let fields = path.split('.').filter(|field| !field.is_empty());
                    Word::Path(fields.map(str::to_owned).collect())
                } else if let Ok(number) = word.parse() {
                    Word::Number(number)
                } else {
                    Word::Name(word.to_owned())
                }
            }
        };
        if let Some(last) = commands.last_mut() {
            last.push(word);
        }
        rest = rest.trim_start();
    }
    if commands.iter().any(Vec::is_empty) {
        return Err("template parsing error: missing value for command".to_owned());
    }
    Ok(commands)
}

fn call(name: &str, args: &[Value]) -> Result<Value, String> {
    let text = |place: usize| args.get(place).map(show).unwrap_or_default();
    let last = || args.last().map(show).unwrap_or_default();
    let number = |place: usize| {
        let value = args.get(place).and_then(Value::as_u64).unwrap_or(0);
        usize::try_from(value).unwrap_or(0).min(1024)
    };
    Ok(Value::String(match name {
        "json" => args.last().unwrap_or(&Value::Null).to_string(),
        "lower" => last().to_lowercase(),
        "upper" => last().to_uppercase(),
        "title" => {
            let text = last();
            let mut chars = text.chars();
            chars
                .next()
                .map(|first| first.to_uppercase().chain(chars).collect())
                .unwrap_or_default()
        }
        "join" => match args.first() {
            Some(Value::Array(items)) => {
                let items: Vec<_> = items.iter().map(show).collect();
                items.join(&text(1))
            }
            _ => text(0),
        },
        "split" => {
            let (whole, by) = (text(0), text(1));
            return Ok(whole.split(by.as_str()).map(Value::from).collect());
        }
        "truncate" => text(0).chars().take(number(1)).collect(),
        "pad" => {
            let pad = |place| " ".repeat(number(place));
            format!("{}{}{}", pad(1), text(0), pad(2))
        }
        "println" => format!("{}\n", args.iter().map(show).collect::<Vec<_>>().join(" ")),
        "len" => match args.last() {
            Some(Value::Array(items)) => items.len().to_string(),
            Some(Value::Object(map)) => map.len().to_string(),
            _ => last().len().to_string(),
        },
        _ => {
            return Err(format!(
                "template parsing error: function {name:?} not defined"
            ));
        }
    }))
}

fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(yes) => *yes,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// A value as Go prints it.
fn show(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(show).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(map) => {
            let items: Vec<_> = map
                .iter()
                .map(|(key, value)| format!("{key}:{}", show(value)))
                .collect();
            format!("map[{}]", items.join(" "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn render(template: &str, data: &Value) -> Result<String, String> {
        Template::parse(template, false)?.render(data)
    }

    #[test]
    fn what_people_write_is_understood() {
        let data = json!({
            "ID": "abc", "Spec": {"Name": "web", "Labels": {"a": "b"}}, "N": 3,
            "VIPs": [{"Addr": "10.0.0.2/24"}, {"Addr": "10.0.1.2/24"}], "None": [], "_labels": {"k": "v"},
        });
        for (template, text) in [
            ("{{.ID}}: {{ .Spec.Name }}", "abc: web"),
            ("{{json .Spec}}", r#"{"Name":"web","Labels":{"a":"b"}}"#),
            ("{{.Spec.Name | upper}}", "WEB"),
            ("{{upper .ID}}\\t{{.N}}", "ABC\t3"),
            ("{{.Label \"k\"}}", "v"),
            ("{{.Label \"x\"}}", ""),
            (
                "{{range .VIPs}}{{.Addr}} {{end}}",
                "10.0.0.2/24 10.0.1.2/24 ",
            ),
            ("{{range .None}}x{{else}}none{{end}}", "none"),
            ("{{if .None}}yes{{else}}no{{end}}", "no"),
            ("{{truncate .ID 2}}|{{pad .N 1 1}}|", "ab| 3 |"),
            ("{{.Missing}}", "<no value>"),
            ("{{.Spec.Labels}}", "map[a:b]"),
            ("{{json .}}", &data.to_string()),
        ] {
            assert_eq!(render(template, &data).unwrap(), text, "{template}");
        }
    }

    #[test]
    fn what_is_not_understood_is_said() {
        for wrong in [
            "{{.A",
            "{{}}",
            "{{nonsense .A}}",
            "{{range .A}}",
            "{{end}}",
            "{{\"a}}",
            "{{.A | }}",
        ] {
            assert!(render(wrong, &json!({})).is_err(), "{wrong}");
        }
        let strict = Template::parse("{{.Nope}}", true).unwrap();
        let error = strict.render(&json!({"ID": "x"})).unwrap_err();
        assert!(error.contains("can't evaluate field Nope"), "{error}");
    }

    proptest! {
        #[test]
        fn parsing_and_rendering_never_panic(text in "[{}.a-zA-Z|\" 0-9é]{0,40}") {
            let _ = render(&text, &json!({"a": [1, 2], "b": {"c": "d"}}));
            let _ = render(&format!("{{{{{text}}}}}"), &json!({"a": [1, 2]}));
        }
    }
}
