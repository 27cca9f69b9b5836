//! `--filter key=value`: parsed, and refused when the key is not one of the list's. Pure.

use std::collections::BTreeMap;

use swarm_proto::v1::Filters;

/// Filters as given: all values by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given(BTreeMap<String, Vec<String>>);

impl Given {
    /// Reads the values of `--filter`; `known` are the keys that the list has.
    pub fn parse(filters: &[String], known: &[&str]) -> Result<Self, String> {
        let mut given = BTreeMap::<String, Vec<String>>::new();
        for filter in filters {
            let (key, value) = filter
                .split_once('=')
                .ok_or("invalid argument: bad format of filter (expected name=value)")?;
            let key = key.trim().to_lowercase();
            if !known.contains(&key.as_str()) {
                return Err(format!(
                    "Error response from daemon: invalid filter '{key}'"
                ));
            }
            given.entry(key).or_default().push(value.trim().to_owned());
        }
        Ok(Self(given))
    }

    /// The values of one key.
    pub fn values(&self, key: &str) -> Vec<String> {
        self.0.get(key).cloned().unwrap_or_default()
    }

    /// Those that every list has.
    pub fn common(&self) -> Filters {
        Filters {
            ids: self.values("id"),
            names: self.values("name"),
            labels: self.values("label"),
        }
    }

    /// The values of a key, each of which must be one of `allowed`, as what is beside it.
    pub fn choices<T: Copy>(&self, key: &str, allowed: &[(&str, T)]) -> Result<Vec<T>, String> {
        self.values(key)
            .iter()
            .map(|value| {
                allowed
                    .iter()
                    .find(|(name, _)| name == value)
                    .map(|(_, choice)| *choice)
                    .ok_or_else(|| {
                        format!("Error response from daemon: invalid filter '{key}={value}'")
                    })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(filters: &[&str]) -> Result<Given, String> {
        let filters: Vec<_> = filters.iter().map(|&filter| filter.to_owned()).collect();
        Given::parse(&filters, &["id", "name", "label", "role"])
    }

    #[test]
    fn filters_of_one_key_are_collected() {
        let given = parse(&["name=a", "label=k=v", "name=b"]).unwrap();
        assert_eq!(given.common().names, ["a", "b"]);
        assert_eq!(given.common().labels, ["k=v"]);
    }

    #[test]
    fn an_unknown_filter_is_refused_by_name() {
        assert_eq!(
            parse(&["bad=1"]),
            Err("Error response from daemon: invalid filter 'bad'".to_owned())
        );
        assert!(parse(&["name"]).is_err());
        let given = parse(&["role=king"]).unwrap();
        assert!(given.choices("role", &[("worker", 1)]).is_err());
    }
}
