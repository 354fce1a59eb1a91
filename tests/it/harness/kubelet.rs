//! A fake kubelet that lists pods for SPIRE's attestor `k8s`.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

/// A server that runs as long as the test program.
pub(crate) struct FakeKubelet {
    port: u16,
    pods: Arc<Mutex<Vec<Value>>>,
}

impl FakeKubelet {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the kubelet's port");
        let port = listener.local_addr().expect("an address").port();
        let pods = Arc::<Mutex<Vec<Value>>>::default();
        let pod_list = pods.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // A client that has closed its connection needs no response.
                let _ = serve(client, &pod_list);
            }
        });
        Self { port, pods }
    }

    /// Returns the agent's configuration of the attestor. awsvid's SPIFFE ID is that of a broker.
    pub(crate) fn attestor(&self, broker: &str) -> String {
        format!(
            "WorkloadAttestor \"k8s\" {{ plugin_data {{ kubelet_read_only_port = {}, disable_container_selectors = true, experimental {{ broker {{ \
             access_policy = \"permissive\", brokers = [{{ id = \"{broker}\" }}] }} }} }} }}",
            self.port
        )
    }

    /// Adds this pod, with this service account, to the list.
    pub(crate) fn add_pod(&self, uid: &str, account: &str) {
        let pod = json!({
            "metadata": { "uid": uid, "name": account, "namespace": "shop" },
            "spec": { "serviceAccountName": account, "nodeName": "node" },
            "status": { "phase": "Running" },
        });
        self.pods.lock().unwrap().push(pod);
    }

    /// Removes all pods from the list.
    pub(crate) fn remove_pods(&self) {
        self.pods.lock().unwrap().clear();
    }
}

fn serve(mut client: TcpStream, pods: &Mutex<Vec<Value>>) -> io::Result<()> {
    let mut lines = BufReader::new(client.try_clone()?).lines();
    while lines
        .next()
        .transpose()?
        .is_some_and(|line| !line.is_empty())
    {}
    let body = json!({ "kind": "PodList", "apiVersion": "v1", "items": *pods.lock().unwrap() })
        .to_string();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n";
    write!(client, "{head}Content-Length: {}\r\n\r\n{body}", body.len())
}
