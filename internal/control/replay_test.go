package control

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"sallyport/internal/mesh"
)

// TestAReplayedRequestGivesNothing sends one certificate request again: by the
// agent that made it, whose answer may have been lost; by another agent, which
// has read it somewhere; and with a key that is another SVID's already. Like
// SPIRE the issuer signs what the sender is entitled to, every time: a request
// is not secret, its names count for nothing, and a certificate is of no use
// without the key, which is not in the request. To refuse a key that was seen
// would let whoever reads a request block its owner, and would forbid a retry.
// What holds it together: the sender gets its own identities only, and each
// certificate is another one in the ledger, so that each can be revoked.
func TestAReplayedRequestGivesNothing(t *testing.T) {
	r := manageRig(t)
	_, ha := r.joined("node-a")
	_, hb := r.joined("node-b")
	a, b := r.raw(ha.cert), r.raw(hb.cert)
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	serials := map[string]bool{}
	// sign asks for an SVID, and holds what comes to the identity and the key.
	sign := func(cc *grpc.ClientConn, entry, path string, key *ecdsa.PrivateKey, csr []byte) codes.Code {
		t.Helper()
		resp, err := svidv1.NewSVIDClient(cc).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entry, Csr: csr}}})
		if err != nil {
			t.Fatal(err)
		}
		res := resp.Results[0]
		if res.Svid == nil {
			return codes.Code(res.Status.Code)
		}
		leaf, err := x509.ParseCertificate(res.Svid.CertChain[0])
		if err != nil {
			t.Fatal(err)
		}
		if id, err := leafID(leaf); err != nil || id.Path() != path || res.Svid.Id.Path != path {
			t.Errorf("%s: signed for %v (%v), want %s", entry, id, err, path)
		}
		if !key.PublicKey.Equal(leaf.PublicKey) {
			t.Errorf("%s: signed for another key than the request's", entry)
		}
		if serial := mesh.SerialText(leaf.SerialNumber); serials[serial] {
			t.Errorf("serial number %s twice", serial)
		} else {
			serials[serial] = true
		}
		return codes.OK
	}
	for range 2 {
		if c := sign(a, "e-pay", payment.Path(), key, csr); c != codes.OK {
			t.Errorf("the agent's own request: %s", c)
		}
	}
	if c := sign(b, "e-pay", payment.Path(), key, csr); c != codes.NotFound {
		t.Errorf("another agent sends the same for the same entry: %s, want NotFound", c)
	}
	// Another agent gets its own identity for a key that it does not have.
	if c := sign(b, "e-bill", billing.Path(), key, csr); c != codes.OK {
		t.Errorf("another agent sends the same for its own entry: %s", c)
	}
	// The key of an agent's own SVID.
	own := ha.cert.PrivateKey.(*ecdsa.PrivateKey)
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, own); err != nil {
		t.Fatal(err)
	}
	if c := sign(a, "e-pay", payment.Path(), own, csr); c != codes.OK {
		t.Errorf("the key of the agent: %s", c)
	}
	// A workload's request, sent by another agent to renew itself: it is the
	// sender that is renewed, and nothing ends before the new SVID is used.
	resp, err := agentv1.NewAgentClient(b).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := resp.Svid.Id.Path, agentID("node-b").Path(); got != want {
		t.Errorf("renewed %s, want %s", got, want)
	}
	if c := sign(a, "e-pay", payment.Path(), own, csr); c != codes.OK {
		t.Errorf("the owner of the key, afterwards: %s", c)
	}
	if c := sign(b, "e-bill", billing.Path(), own, csr); c != codes.OK {
		t.Errorf("the agent that asked to be renewed, afterwards: %s", c)
	}
	r.reg.mu.Lock()
	defer r.reg.mu.Unlock()
	recorded := map[string]bool{}
	for _, i := range r.reg.issued {
		recorded[i.Serial] = true
		if i.Entry == "e-pay" && i.Agent != agentID("node-a") || i.Entry == "e-bill" && i.Agent != agentID("node-b") {
			t.Errorf("recorded %+v under another agent", i)
		}
	}
	for s := range serials {
		if !recorded[s] {
			t.Errorf("%s was given out and not recorded", s)
		}
	}
}
