package test

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestNodesShareAnAlias: nodes with certificates of one authority, and one that
// joined by a token and is named, run the workload of one entry. A node of
// another authority is attested and gets nothing, until a call makes it one of
// the alias; when the call is taken back its SVID is revoked.
func TestNodesShareAnAlias(t *testing.T) {
	w := newWorld(t, time.Minute)
	ours, theirs := newNodeCA(t), newNodeCA(t)
	conf, err := os.ReadFile(w.path("issuer", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("issuer", string(conf)+"attestors: {x509pop: {ca_file: "+w.keep("nodes.pem", append(ours.pem(), theirs.pem()...))+"}}\n")
	sum := sha1.Sum(ours.cert.Raw)
	alias, run := id("/group/edge"), id("/ns/edge/sa/run")
	file := w.path("policies", "entries.yaml")
	entries, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	w.put(file, string(entries)+fmt.Sprintf(`
  - {spiffe_id: %[1]q, parent_id: %[2]q, selectors: ["x509pop:ca:fingerprint:%[3]s"]}
  - {spiffe_id: %[1]q, parent_id: %[2]q, selectors: ["spiffe_id:%[4]s"]}
  - {spiffe_id: %[5]q, parent_id: %[1]q, selectors: ["child:true"]}
`, alias, id("/spire/server"), hex.EncodeToString(sum[:]), id("/spire/agent/join_token/named"), run))
	ours.node(t, w, "edge1")
	ours.node(t, w, "edge2")
	stranger := theirs.node(t, w, "stranger")
	w.startIssuer()
	w.write("named", w.proxyConfig("named", w.token("named")))

	app := func(name, script string) *proc {
		return w.start(name, nil, "sidecar", "run", "--config", w.path(name, "config.yaml"), "--", "sh", "-c", script)
	}
	for _, name := range []string{"edge1", "edge2", "named"} {
		if p := app(name, "echo ran"); p.end() != 0 || !strings.Contains(p.out.String(), "ran\n") {
			t.Errorf("%s did not run the workload: %s", name, p.out.String())
		}
	}
	node := id("/spire/agent/x509pop/" + stranger)
	left := app("stranger", "echo ran; exec sleep 60")
	w.awaitAudit("issuer", "the attestation of the stranger", func(l auditLine) bool {
		return l.Kind == "attest" && l.Decision == "allow" && l.Src == node
	})
	if strings.Contains(left.out.String(), "ran\n") {
		t.Fatal("the stranger runs the workload")
	}
	if out, err := w.operate("entry create " + alias + " --id guest --parent " + id("/spire/server") + " --selector spiffe_id:" + node); err != nil {
		t.Fatal(out, err)
	}
	left.await("run its workload", func() bool { return strings.Contains(left.out.String(), "ran\n") })
	if out, err := w.operate("entry delete guest"); err != nil {
		t.Fatal(out, err)
	}
	w.awaitAudit("issuer", "the revocation", func(l auditLine) bool { return l.Kind == "issue" && l.Reason == "entry_withdrawn" && l.Dst == run })
}
