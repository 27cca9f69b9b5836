//! Filters of lists: values of one field are alternatives, fields are all required.

use std::collections::BTreeMap;

use swarm_proto::v1::Filters;

/// How names are compared.
#[derive(Clone, Copy, Debug)]
pub(super) enum NameMatch {
    Prefix,
    Substring,
}

/// Most values of one filter: each is compared with each object.
const VALUES_MAX: usize = 1000;

/// Refuses filters that would take a manager's time.
pub(super) fn check(
    filters: Option<&Filters>,
    others: &[(&str, usize)],
) -> Result<(), tonic::Status> {
    let common = filters.into_iter().flat_map(|filters| {
        [
            ("id", filters.ids.len()),
            ("name", filters.names.len()),
            ("label", filters.labels.len()),
        ]
    });
    match common
        .chain(others.iter().copied())
        .find(|(_, number)| *number > VALUES_MAX)
    {
        None => Ok(()),
        Some((name, number)) => Err(tonic::Status::invalid_argument(format!(
            "{number} values of filter {name} are more than {VALUES_MAX}"
        ))),
    }
}

/// Whether an object passes the filters.
pub(super) fn passes(
    filters: Option<&Filters>,
    by: NameMatch,
    id: &str,
    name: &str,
    labels: Option<&BTreeMap<String, String>>,
) -> bool {
    let Some(filters) = filters else { return true };
    let name_matches = |wanted: &String| match by {
        NameMatch::Prefix => name.starts_with(wanted),
        NameMatch::Substring => name.contains(wanted),
    };
    any_of(&filters.ids, |prefix| id.starts_with(prefix))
        && any_of(&filters.names, name_matches)
        && has_labels(&filters.labels, labels)
}

/// Whether the labels contain all that are wanted, each "key" or "key=value".
pub(super) fn has_labels(wanted: &[String], labels: Option<&BTreeMap<String, String>>) -> bool {
    wanted.iter().all(|wanted| {
        labels.is_some_and(|labels| match wanted.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|found| found == value),
            None => labels.contains_key(wanted),
        })
    })
}

/// Whether one of the values matches, or none is given.
pub(super) fn any_of<T>(values: &[T], matches: impl FnMut(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(ids: &[&str], names: &[&str], labels: &[&str]) -> Filters {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        Filters {
            ids: owned(ids),
            names: owned(names),
            labels: owned(labels),
        }
    }

    #[test]
    fn values_of_a_filter_are_bounded() {
        let many = vec!["x"; VALUES_MAX];
        assert!(check(Some(&filters(&many, &many, &many)), &[("mode", VALUES_MAX)]).is_ok());
        let more = vec!["x"; VALUES_MAX + 1];
        for wrong in [
            check(Some(&filters(&more, &[], &[])), &[]),
            check(Some(&filters(&[], &[], &more)), &[]),
            check(None, &[("mode", VALUES_MAX + 1)]),
        ] {
            assert_eq!(wrong.unwrap_err().code(), tonic::Code::InvalidArgument);
        }
    }

    #[test]
    fn values_are_alternatives_and_fields_are_all_required() {
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
        let passes =
            |filters: Filters, by| super::passes(Some(&filters), by, "id1", "web", Some(&labels));
        assert!(super::passes(None, NameMatch::Prefix, "id1", "web", None));
        assert!(passes(
            filters(&["x", "id"], &["we"], &["a"]),
            NameMatch::Prefix
        ));
        assert!(!passes(filters(&["id"], &["eb"], &[]), NameMatch::Prefix));
        assert!(passes(
            filters(&["id"], &["eb"], &["a=1"]),
            NameMatch::Substring
        ));
        assert!(!passes(filters(&[], &[], &["a=2"]), NameMatch::Prefix));
        assert!(!passes(filters(&[], &[], &["a", "b"]), NameMatch::Prefix));
    }
}
