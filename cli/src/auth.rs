//! Registry credentials from the user's `~/.docker/config.json`.

use std::path::PathBuf;

use base64::Engine as _;
use serde_json::Value;
use swarm_proto::image::ImageRef;
use swarm_proto::v1::RegistryAuth;

/// Docker Hub, as its clients have always written it.
const HUB: &str = "https://index.docker.io/v1/";

/// The credentials for the registry of an image, if the user has logged in there.
pub fn for_image(image: &str) -> Option<RegistryAuth> {
    let directory = match std::env::var_os("DOCKER_CONFIG") {
        Some(directory) => PathBuf::from(directory),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".docker"),
    };
    let text = std::fs::read_to_string(directory.join("config.json")).ok()?;
    find(&serde_json::from_str(&text).ok()?, image)
}

pub(crate) fn registry(image: &str) -> String {
    match ImageRef::parse(image) {
        Ok(image) if image.registry() != "docker.io" => image.registry().to_owned(),
        _ => HUB.to_owned(),
    }
}

pub(crate) fn find(config: &Value, image: &str) -> Option<RegistryAuth> {
    let wanted = registry(image);
    let auths = config.get("auths")?.as_object()?;
    let plain = |name: &str| {
        let name = name
            .trim_start_matches("https://")
            .trim_start_matches("http://");
        name.split('/').next().unwrap_or(name).to_owned()
    };
    let (_, entry) = auths
        .iter()
        .find(|(name, _)| **name == wanted)
        .or_else(|| auths.iter().find(|(name, _)| plain(name) == plain(&wanted)))?;
    let text = |key: &str| {
        entry
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or("")
            .to_owned()
    };
    let mut found = RegistryAuth {
        username: text("username"),
        password: text("password"),
        identity_token: text("identitytoken"),
    };
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(text("auth"))
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok());
    if let Some((user, password)) = decoded.as_deref().and_then(|pair| pair.split_once(':')) {
        user.clone_into(&mut found.username);
        password
            .trim_end_matches('\0')
            .clone_into(&mut found.password);
    }
    let empty = found.username.is_empty() && found.identity_token.is_empty();
    (!empty).then_some(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn credentials_are_found_by_the_image_s_registry() {
        let config = json!({"auths": {
            "https://index.docker.io/v1/": {"auth": "aHViOnNlY3JldA=="},
            "registry.example:5000": {"auth": "bWU6YTpi"},
            "token.example": {"identitytoken": "t"},
            "empty.example": {},
        }});
        let of = |image: &str| find(&config, image);
        assert_eq!(of("nginx").unwrap().username, "hub");
        assert_eq!(of("library/nginx:1").unwrap().password, "secret");
        // Also for those who write the Hub's name.
        assert_eq!(of("docker.io/library/nginx").unwrap().username, "hub");
        let own = of("registry.example:5000/a/b:tag").unwrap();
        assert_eq!(
            (own.username.as_str(), own.password.as_str()),
            ("me", "a:b")
        );
        assert_eq!(of("token.example/x").unwrap().identity_token, "t");
        assert_eq!(of("empty.example/x"), None);
        assert_eq!(of("other.example/x"), None);
        assert_eq!(find(&json!([]), "nginx"), None);
    }
}
