//! What the documentation says of the configuration is what the agent has.

use vmsnap_agent::config::Config;

#[test]
fn the_example_configuration_is_the_defaults() {
    let text = include_str!("../../docs/agent.example.toml");
    let example = Config::parse(text, "agent.example.toml").unwrap();
    assert_eq!(example, Config::default());
    assert_eq!(example.check(), Ok(()));
}
