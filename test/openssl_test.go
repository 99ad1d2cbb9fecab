package test

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

func TestOpenSSL(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "openssl")
	w := newWorld(t, time.Minute)
	w.startIssuer()
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	w.startNode(bill)
	payment := w.startNode(pay)

	got := ask[svidReply](payment, "/svid", struct{}{})
	leaf, rest, key, roots := w.path("leaf.pem"), w.path("rest.pem"), w.path("key.pem"), w.path("roots.pem")
	w.put(leaf, got.Leaf)
	w.put(rest, got.Rest)
	w.put(key, got.Key)
	w.put(roots, got.BundlePEM)

	t.Run("verify accepts the chain", func(t *testing.T) {
		r := command(t, "openssl", "verify", "-x509_strict", "-CAfile", roots, "-untrusted", rest, leaf)
		if r.Code != 0 {
			t.Errorf("openssl verify: %s", r.Output)
		}
	})
	t.Run("verify needs the intermediate", func(t *testing.T) {
		if r := command(t, "openssl", "verify", "-CAfile", roots, leaf); r.Code == 0 {
			t.Errorf("openssl verify: %s", r.Output)
		}
	})
	t.Run("the issuer's file of roots is the bundle", func(t *testing.T) {
		r := command(t, "openssl", "verify", "-CAfile", w.path("issuer", "bundle.pem"), "-untrusted", rest, leaf)
		if r.Code != 0 {
			t.Errorf("openssl verify: %s", r.Output)
		}
	})

	client := []string{"s_client", "-connect", bill.in, "-CAfile", roots, "-verify_return_error", "-ign_eof", "-servername", "billing"}
	identity := []string{"-cert", leaf, "-cert_chain", rest, "-key", key}
	const request = "GET /v1/charges/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nConnection: close\r\n\r\n"
	t.Run("s_client with an SVID is served over TLS 1.3", func(t *testing.T) {
		out, err := talk(t, request, append(client, identity...)...)
		for _, want := range []string{"TLSv1.3", "Verify return code: 0 (ok)", "HTTP/1.1 200 OK", `"path":"/v1/charges/1"`} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q (%v) in:\n%s", want, err, out)
			}
		}
	})
	t.Run("s_client without an SVID is not served", func(t *testing.T) {
		out, err := talk(t, request, client...)
		if err == nil || strings.Contains(out, "HTTP/1.1") || !strings.Contains(out, "certificate required") {
			t.Errorf("not refused with an alert (%v):\n%s", err, out)
		}
		w.awaitAudit("billing", "the handshake", func(r auditLine) bool { return r.Kind == "tls" && r.Decision == "deny" })
	})
	t.Run("s_client with TLS 1.2 is not served", func(t *testing.T) {
		out, err := talk(t, request, append(append(client, "-tls1_2"), identity...)...)
		if err == nil || strings.Contains(out, "HTTP/1.1") {
			t.Errorf("not refused (%v):\n%s", err, out)
		}
	})
}

// talk has openssl say something and gives all that came back.
func talk(t *testing.T, say string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(say), &out, &out
	err := cmd.Run()
	return out.String(), err
}
