package test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// says checks that a process has ended with a code and one sentence, which has
// all the parts.
func (p *proc) says(code int, parts ...string) {
	p.t.Helper()
	got, out := p.end(), strings.TrimSpace(p.out.String())
	if got != code || strings.Contains(out, "\n") || strings.Contains(out, "goroutine ") {
		p.t.Errorf("%s: status %d, want %d with one sentence:\n%s", p.name, got, code, out)
	}
	for _, part := range parts {
		if !strings.Contains(out, part) {
			p.t.Errorf("%s: no %q in: %s", p.name, part, out)
		}
	}
}

// failing starts a sidecar that is to fail, and logs errors only.
func (w *world) failing(name, config string) *proc {
	w.t.Helper()
	return w.start(name, []string{"SALLYPORT_LOG_LEVEL=error"}, "sidecar", "run", "--config", w.write(name, config))
}

func TestFailures(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()
	elsewhere := strings.NewReplacer("trust_domain: "+trustDomain, "trust_domain: other.example")

	t.Run("a data_dir of another trust domain", func(t *testing.T) {
		n := &node{name: "payment"}
		w.join(n)
		w.startNode(n).stop()
		w.failing("payment", elsewhere.Replace(w.proxyConfig("payment", ""))).
			says(1, "belongs to trust domain "+trustDomain, "the configuration says other.example; next: correct trust_domain")
	})
	t.Run("an issuer of another trust domain", func(t *testing.T) {
		w.failing("stranger", elsewhere.Replace(w.proxyConfig("stranger", "5e5e"))).says(1, "wrong trust domain", w.issuer)
	})
	t.Run("an issuer that the bundle does not vouch for", func(t *testing.T) {
		other := newAuthority(t)
		w.put(w.path("other.pem"), certsPEM(other.cert))
		c := strings.Replace(w.proxyConfig("wary", "5e5e"), w.path("issuer", "bundle.pem"), w.path("other.pem"), 1)
		w.failing("wary", c).says(1, "issuer not trusted", w.issuer)
	})
	for name, at := range map[string]time.Time{"ahead": time.Now().Add(-24 * time.Hour), "behind": time.Now().Add(24 * time.Hour)} {
		t.Run("a clock that is a day "+name, func(t *testing.T) {
			ca := newAuthority(t)
			w.put(w.path(name+".pem"), certsPEM(ca.cert))
			c := strings.NewReplacer(w.path("issuer", "bundle.pem"), w.path(name+".pem"), w.issuer, ca.serveIssuer(at)).
				Replace(w.proxyConfig(name, "5e5e"))
			w.failing(name, c).says(1, "clock outside the issuer's validity", "clock")
		})
	}
	t.Run("a port that is taken", func(t *testing.T) {
		n := &node{name: "billing"}
		w.join(n)
		taken, err := net.Listen("tcp", n.out)
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		w.failing("billing", contents(t, w.path("billing", "config.yaml"))).
			says(1, "outbound.listen: ", n.out, "address already in use; next: free the port, or change outbound.listen in the configuration")
	})
	t.Run("the port of a gateway that is taken", func(t *testing.T) {
		file := w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+"listen: "+w.issuer+"\nresolvers: [\"192.0.2.53:53\"]\n")
		w.start("gateway", []string{"SALLYPORT_LOG_LEVEL=error"}, "gateway", "run", "--config", file).
			says(1, w.issuer, "address already in use; next: free the port, or change listen in the configuration")
	})
	t.Run("a data_dir that this user may not write", func(t *testing.T) {
		if err := os.Chmod(w.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		dir, file := w.path("readonly"), w.path("readonly.yaml")
		if err := os.Mkdir(dir, 0o555); err != nil {
			t.Fatal(err)
		}
		w.put(file, strings.Replace(contents(t, w.path("issuer", "config.yaml")), "data_dir: "+w.path("issuer"), "data_dir: "+dir, 1))
		if err := os.Chmod(file, 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(bin, "issuer"), "run", "--config", file)
		if os.Geteuid() == 0 { // who may write anything
			if err := os.Chmod(bin, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != 1 || !(strings.Contains(string(out), "data_dir "+dir+" belongs to uid ") || strings.Contains(string(out), "write in data_dir "+dir+": permission denied; next: ")) {
			t.Errorf("%v:\n%s", err, out)
		}
	})
	t.Run("an issuer that does not answer the CLI", func(t *testing.T) {
		r := command(t, filepath.Join(bin, "sallyport"), "status", "--socket", w.path("none.sock"))
		if r.Code != 3 || strings.Count(r.Output, "\n") != 1 || !strings.Contains(r.Output, "; next: start it with: issuer run --config FILE") {
			t.Errorf("status %d:\n%s", r.Code, r.Output)
		}
	})
}

// An authority signs for the trust domain, without being its issuer.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t)}
	a.cert = a.sign(&x509.Certificate{
		URIs:      []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		NotBefore: time.Now().Add(-72 * time.Hour), NotAfter: time.Now().Add(72 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, a.key)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sign makes a certificate; the first is the authority's own.
func (a *authority) sign(c *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	a.t.Helper()
	parent := a.cert
	if parent == nil {
		parent = c
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return out
}

// serveIssuer plays an issuer whose clock stands at another time, and returns
// its address.
func (a *authority) serveIssuer(at time.Time) string {
	a.t.Helper()
	key := newKey(a.t)
	leaf := a.sign(&x509.Certificate{
		URIs:      []*url.URL{{Scheme: "spiffe", Host: trustDomain, Path: "/spire/server"}},
		NotBefore: at.Add(-time.Minute), NotAfter: at.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, key)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}},
		ClientAuth:   tls.RequestClientCert, NextProtos: []string{"h2"},
	})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.(*tls.Conn).Handshake() // the client ends it
			c.Close()
		}
	}()
	return ln.Addr().String()
}
