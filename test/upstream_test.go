package test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"go.step.sm/crypto/jose"

	"sallyport/internal/meshtest"
)

// spiffeCA is the template of docs/upstream-ca.md.
const spiffeCA = `{"subject": {{ toJson .Subject }}, "sans": {{ toJson .SANs }}, "keyUsage": ["certSign", "crlSign"], "basicConstraints": {"isCA": true, "maxPathLen": 1}}`

// A stepCA is an authority of its own: a root, an intermediate and step-ca.
type stepCA struct {
	w    *world
	addr string
	pin  string // of the root
	proc *proc
}

// TestUpstream has a real step-ca sign the issuer's intermediate.
func TestUpstream(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "openssl")
	meshtest.Need(t, "curl")
	w := newWorld(t, 10*time.Second)
	up := w.newStepCA()
	w.write("issuer", fmt.Sprintf(`trust_domain: %s
data_dir: %s/issuer
listen: %s
policies: %s
ca:
  x509_ttl: 10s
  jwt_ttl: 2s
  agent_ttl: 30s
  allow_short_ttl: true
  upstream:
    kind: step-ca
    url: https://%s
    fingerprints: [%s]
    provisioner: sallyport
    key_file: %s
    password_file: %s
`, trustDomain, w.dir, w.issuer, w.policy, up.addr, up.pin, w.path("up", "provisioner.jwk"), w.path("up", "password")))

	// Without step-ca there is nothing to start with.
	p := w.start("issuer", nil, "issuer", "run", "--config", w.path("issuer", "config.yaml"))
	<-p.done
	if out := p.out.String(); p.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(out, "ask the upstream authority") {
		t.Errorf("without step-ca:\n%s", out)
	}

	up.start()
	issuer := w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	w.startNode(bill)
	payment := w.startNode(pay)
	const url = "http://billing.mesh.internal/v1/charges"
	w.awaitReach(payment, url)
	first := w.verifyUpstream(payment, up)
	root := w.roots()

	ended := payment.keepsCalling(t, url)
	// Everybody trusts the root, so that activation ends it.
	w.moves(t, "prepared steady", "ca", "rotate", "--through")
	w.await("end the rotation", func() bool { return w.roots().Phase == "steady" })
	var second string
	w.await("sign under the new intermediate", func() bool { second = w.verifyUpstream(payment, up); return second != first })
	if now := w.roots(); now.Authorities[0].ID != root.Authorities[0].ID {
		t.Errorf("the root is another: %+v, was %+v", now, root)
	}

	// step-ca is down: the issuer signs on, and starts.
	up.proc.kill()
	if r := w.sallyport("ca", "rotate"); r.Code != 1 || !strings.Contains(r.Output, "ask the upstream authority") || w.roots().Phase != "steady" {
		t.Errorf("a rotation without step-ca: %d %s", r.Code, r.Output)
	}
	issuer.kill()
	issuer = w.startIssuer()
	w.awaitReach(payment, url)
	if third := w.verifyUpstream(payment, up); third != second {
		t.Errorf("another intermediate without step-ca: %s, was %s", third, second)
	}
	up.start()
	w.moves(t, "prepared steady", "ca", "rotate", "--through")
	w.await("sign under the third intermediate", func() bool { return w.verifyUpstream(payment, up) != second })
	if r := w.sallyport("ca", "rotate", "--emergency"); r.Code != 1 || !strings.Contains(r.Output, "the same root") {
		t.Errorf("an emergency under the same root: %d %s", r.Code, r.Output)
	}

	// step-ca gets another root: both are pinned, and it signs once it is trusted.
	up.proc.kill()
	old := up.pin
	up.renewRoot("new")
	up.start()
	issuer.kill()
	conf, err := os.ReadFile(w.path("issuer", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("issuer", strings.Replace(string(conf), "["+old+"]", "["+old+", "+up.pin+"]", 1))
	w.startIssuer()
	if r := w.sallyport("ca", "rotate", "--through"); r.Code != 0 {
		t.Errorf("rotate to the new root: %s", r.Output)
	}
	w.awaitRoot(root)
	w.await("sign under the new root", func() bool {
		bundle, err := os.ReadFile(w.path("issuer", "bundle.pem"))
		return err == nil && bytes.Count(bundle, []byte("BEGIN CERTIFICATE")) == 1
	})
	w.verifyUpstream(payment, up)
	t.Logf("intermediate rotated twice, root once, step-ca and the issuer killed twice: %d requests made", ended())
}

// verifyUpstream verifies the SVID of a workload with openssl against the
// bundle, which is step-ca's root, and returns the intermediate's serial number.
func (w *world) verifyUpstream(workload *hand, up *stepCA) string {
	w.t.Helper()
	got := ask[svidReply](workload, "/svid", struct{}{})
	w.put(w.path("leaf.pem"), got.Leaf)
	w.put(w.path("rest.pem"), got.Rest)
	if r := command(w.t, "openssl", "verify", "-x509_strict", "-CAfile", w.path("issuer", "bundle.pem"), "-untrusted", w.path("rest.pem"), w.path("leaf.pem")); r.Code != 0 {
		w.t.Errorf("openssl verify: %s", r.Output)
	}
	bundle, err := os.ReadFile(w.path("issuer", "bundle.pem"))
	if err != nil {
		w.t.Fatal(err)
	}
	block, rest := pem.Decode(bundle)
	if sum := sha256.Sum256(block.Bytes); len(rest) > 0 || hex.EncodeToString(sum[:]) != up.pin {
		w.t.Errorf("the bundle is not the root of step-ca alone:\n%s", bundle)
	}
	block, rest = pem.Decode([]byte(got.Rest))
	if above, _ := pem.Decode(rest); above == nil {
		w.t.Errorf("the chain ends with our intermediate:\n%s", got.Rest)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		w.t.Fatal(err)
	}
	return cert.SerialNumber.String()
}

// newStepCA makes the authority's keys and configuration; it does not start it.
func (w *world) newStepCA() *stepCA {
	w.t.Helper()
	buildTool(w.t, "stepca", ".", "step-ca")
	up := &stepCA{w: w, addr: freePort(w.t)}
	if err := os.Mkdir(w.path("up"), 0o700); err != nil {
		w.t.Fatal(err)
	}
	up.renewRoot("first")
	jwk, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
	if err != nil {
		w.t.Fatal(err)
	}
	public := jwk.Public()
	if jwk.KeyID, err = jose.Thumbprint(&public); err != nil {
		w.t.Fatal(err)
	}
	public.KeyID = jwk.KeyID
	sealed, err := jose.EncryptJWK(jwk, []byte("open sesame"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(w.path("up", "provisioner.jwk"), sealed.FullSerialize())
	w.put(w.path("up", "password"), "open sesame\n")
	conf, err := json.Marshal(map[string]any{
		"root": w.path("up", "root.crt"), "crt": w.path("up", "mid.crt"), "key": w.path("up", "mid.key"),
		"address": up.addr, "dnsNames": []string{"127.0.0.1"}, "logger": map[string]string{"format": "text"},
		"authority": map[string]any{"provisioners": []any{map[string]any{
			"type": "JWK", "name": "sallyport", "key": public,
			"claims":  map[string]any{"maxTLSCertDuration": "168h", "disableSmallstepExtensions": true},
			"options": map[string]any{"x509": map[string]string{"template": spiffeCA}},
		}}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(w.path("up", "ca.json"), string(conf))
	return up
}

// renewRoot gives the authority another root; step-ca takes it when it starts.
func (up *stepCA) renewRoot(name string) {
	up.w.t.Helper()
	key, root := up.w.authority(name+" root", 3, nil, nil, "root")
	up.w.authority(name+" intermediate", 2, root, key, "mid")
	sum := sha256.Sum256(root.Raw)
	up.pin = hex.EncodeToString(sum[:])
}

// start starts step-ca and waits until it answers.
func (up *stepCA) start() {
	up.w.t.Helper()
	up.proc = up.w.start("step-ca", nil, "step-ca", up.w.path("up", "ca.json"))
	up.w.await("start step-ca", func() bool {
		return command(up.w.t, "curl", "-sS", "-f", "--cacert", up.w.path("up", "root.crt"), "https://"+up.addr+"/health").Code == 0
	})
}

// authority makes a CA certificate and its key in the folder up.
func (w *world) authority(name string, pathLen int, parent *x509.Certificate, by *ecdsa.PrivateKey, file string) (*ecdsa.PrivateKey, *x509.Certificate) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: pathLen, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if parent == nil {
		parent, by = template, key
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(raw)
	if err != nil {
		w.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(w.path("up", file+".crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})))
	w.put(w.path("up", file+".key"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	return key, cert
}
