//! Raw calls at random to a running agent: it lives on, and changes nothing.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context as _, Result};
use proptest::{collection::vec, prelude::*, sample::select};
use prost::{
    Message as _,
    bytes::{Buf as _, BufMut as _},
};
use tonic::{
    Code, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use vmsnap_fuzz::{
    Class,
    inputs::{damaged, numbers, texts},
};
use vmsnap_proto::v1;
use vmsnap_tests::{Agent, BlankSpec, Domain, Lab};

/// Memory that the agent may have taken in addition afterwards, in KiB.
const MORE: u64 = 128 << 10;

/// Messages as bytes.
#[derive(Debug, Clone, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; from.remaining()];
        from.copy_to_slice(&mut bytes);
        Ok(Some(bytes))
    }
}

/// Every method of the contract.
fn methods() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(vmsnap_proto::DESCRIPTORS).unwrap();
    let mut methods = Vec::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                methods.push(format!(
                    "/{}.{}/{}",
                    file.package(),
                    service.name(),
                    method.name()
                ));
            }
        }
    }
    methods
}

/// Calls a method, and takes no more than its first answers.
async fn call(channel: &Channel, method: &str, message: Vec<u8>) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client
        .ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let path = method
        .parse()
        .map_err(|_| Status::internal("the method is no path"))?;
    let request = tonic::Request::new(tokio_stream::once(message));
    let mut answers = client.streaming(request, path, Raw).await?.into_inner();
    for _ in 0..20 {
        if answers.message().await?.is_none() {
            break;
        }
    }
    Ok(())
}

/// Messages whose fields have the numbers that the contract uses.
fn messages() -> impl Strategy<Value = Vec<u8>> {
    let field = (
        1..18_u32,
        prop_oneof![
            numbers().prop_map(|number| (0_u8, number.to_le_bytes().to_vec())),
            texts().prop_map(|text| (2, text.into_bytes())),
            vec(any::<u8>(), 0..40).prop_map(|bytes| (2, bytes)),
        ],
    );
    vec(field, 0..6).prop_map(|fields| {
        let mut message = Vec::new();
        for (number, (kind, bytes)) in fields {
            prost::encoding::encode_varint(u64::from(number << 3) | u64::from(kind), &mut message);
            if kind == 0 {
                let number = i64::from_le_bytes(bytes.try_into().unwrap_or_default());
                prost::encoding::encode_varint(number.cast_unsigned(), &mut message);
            } else {
                prost::encoding::encode_varint(bytes.len() as u64, &mut message);
                message.extend(bytes);
            }
        }
        message
    })
}

/// Runs and plans on the VM that is there, for snapshots that are not.
fn on_the_vm(vm: String) -> impl Strategy<Value = Vec<u8>> {
    let actions = select(vec![
        v1::Action::Revert,
        v1::Action::Commit,
        v1::Action::Confirm,
        v1::Action::List,
    ]);
    (actions, 7..100_i32, numbers(), any::<bool>(), texts()).prop_map(
        move |(action, odd, seconds, force, pool)| {
            let spec = v1::WorkflowSpec {
                vm_name: vm.clone(),
                action: action.into(),
                snapshot_name: "is-not-there".into(),
                pool: if force { String::new() } else { pool },
                revert: (action == v1::Action::Revert).then(|| v1::RevertOptions {
                    wait_for: if force { 0 } else { odd },
                    wait_timeout: Some(prost_types::Duration {
                        seconds,
                        nanos: odd,
                    }),
                    force,
                    ..Default::default()
                }),
                ..Default::default()
            };
            v1::RunWorkflowRequest {
                spec: Some(spec),
                ..Default::default()
            }
            .encode_to_vec()
        },
    )
}

/// What others see of the VM.
fn seen(domain: &Domain) -> Result<(String, Vec<String>, u64, std::time::SystemTime)> {
    let xml = domain.virsh("dumpxml", &[])?;
    let disk = fs::metadata(domain.disk("vda")?)?;
    Ok((xml, domain.snapshots()?, disk.len(), disk.modified()?))
}

/// Its resident memory in KiB.
fn memory(agent: &Agent) -> Result<u64> {
    let pid = agent.pid().context("the agent runs")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("the agent's memory")?.parse()?)
}

#[test]
fn an_agent_answers_any_call_lives_on_and_leaves_its_vm_as_it_was() -> Result<()> {
    let lab = Lab::from_env()?;
    let (domain, agent) = (lab.blank(&BlankSpec::default())?, lab.agent("")?);
    assert_eq!(
        agent
            .vmsnap(&["create", &domain.name, "before"])?
            .result()?["changed"],
        true
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let address = format!("http://{}", agent.tcp()?);
    let channel = runtime.block_on(Channel::from_shared(address)?.connect())?;
    let methods = methods();
    assert!(methods.len() > 8, "{methods:?}");
    let (was, took) = (seen(&domain)?, memory(&agent)?);

    // A name that libvirt cannot have is the caller's slip.
    for method in ["InventoryService/GetVm", "InventoryService/ListSnapshots"] {
        let name = v1::GetVmRequest {
            vm_name: "a\0b".into(),
        };
        let method = format!("/vmsnap.v1.{method}");
        let refused = runtime.block_on(call(&channel, &method, name.encode_to_vec()));
        let code = refused.map_err(|status| status.code());
        assert_eq!(code, Err(Code::InvalidArgument), "{method}");
    }

    let own = on_the_vm(domain.name.clone()).boxed();
    let sound = v1::RunWorkflowRequest {
        spec: Some(v1::WorkflowSpec {
            vm_name: "nobody".into(),
            action: v1::Action::Create.into(),
            snapshot_name: "x".into(),
            create: Some(v1::CreateOptions::default()),
            ..Default::default()
        }),
        ..Default::default()
    };
    let inputs = (
        select(methods),
        prop_oneof![
            4 => messages(),
            3 => damaged(sound.encode_to_vec()),
            2 => vec(any::<u8>(), 0..300),
            1 => own,
        ],
    );
    let codes = std::cell::RefCell::new(BTreeSet::new());
    Class::new("agent, calls", 25)
        .few(64)
        .check(&inputs, |(method, message)| {
            // Who follows the audit trail follows it until he leaves.
            let follows = method.ends_with("/WatchAudit");
            let answer = runtime.block_on(async {
                let limit = Duration::from_millis(if follows { 300 } else { 8_000 });
                tokio::time::timeout(limit, call(&channel, &method, message)).await
            });
            match answer {
                // A watcher of nothing that ends is left to itself.
                Ok(Ok(())) => {}
                Ok(Err(status)) => {
                    // A panic behind a call cuts it off, or is told as one of these.
                    prop_assert!(
                        !matches!(
                            status.code(),
                            Code::Unavailable | Code::Unknown | Code::DataLoss
                        ),
                        "{method}: {status}"
                    );
                    codes.borrow_mut().insert(status.code().description());
                }
                Err(_) => prop_assert!(follows, "{method} does not answer"),
            }
            Ok(())
        });
    assert!(!codes.into_inner().is_empty(), "no call was refused");

    let listed = agent.vmsnap(&["ls", &domain.name])?;
    assert!(listed.document()?.to_string().contains("before"));
    assert_eq!(seen(&domain)?, was);
    let takes = memory(&agent)?;
    assert!(takes < took + MORE, "{took} KiB before, {takes} KiB after");
    let log = agent.log();
    assert!(!log.contains("panicked"), "{log}");
    domain.check("vda")
}
