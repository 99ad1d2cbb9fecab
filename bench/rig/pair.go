package rig

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A Pair is two proxies, app -> proxy -> mutual TLS -> proxy -> app.
type Pair struct {
	Name     string
	Settings string // as they are printed
	Target   string // where the load goes
	Far      string // where the half listens that takes mutual TLS
	Procs    []*Process
	Workers  bool // the processes have workers
}

// Stop ends both.
func (p *Pair) Stop() {
	for _, proc := range p.Procs {
		proc.Stop()
	}
}

// PIDs are those of both, with their workers.
func (p *Pair) PIDs() (out []int) {
	for _, proc := range p.Procs {
		out = append(out, proc.PIDs(p.Workers)...)
	}
	return out
}

// A Ground is where pairs of other programs stand: a directory with ca.pem,
// client.pem and server.pem, each certificate and key, ECDSA P-256 as our own
// are. Whoever makes one calls Close.
type Ground struct {
	Dir  string
	Self string // this program
	ends []func()
}

// NewGround makes the directory.
func NewGround() (*Ground, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "spb-")
	if err != nil {
		return nil, err
	}
	g := &Ground{Dir: dir, Self: self}
	g.AtEnd(func() { _ = os.RemoveAll(dir) })
	return g, g.certificates()
}

// AtEnd has f called by Close, the last first.
func (g *Ground) AtEnd(f func()) { g.ends = append(g.ends, f) }

// Close ends what was begun here.
func (g *Ground) Close() {
	for _, f := range slices.Backward(g.ends) {
		f()
	}
}

// File writes a file and returns its path.
func (g *Ground) File(name, text string) (string, error) {
	path := filepath.Join(g.Dir, name)
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// Ports are free addresses for both halves of a pair.
func (g *Ground) Ports() (front, far string, err error) {
	front, err1 := FreePort()
	far, err2 := FreePort()
	return front, far, errors.Join(err1, err2)
}

// SpawnPair starts both halves of p, the far one first, and waits for both.
func (g *Ground) SpawnPair(ctx context.Context, p *Pair, far string, back, front []string) error {
	p.Far = far
	for i, argv := range [][]string{back, front} {
		proc, err := Spawn(g.Dir, fmt.Sprintf("%s-%d", p.Name, i), argv...)
		if err != nil {
			p.Stop()
			return err
		}
		p.Procs = append(p.Procs, proc)
		if err := proc.Await(ctx, "tcp", []string{far, p.Target}[i]); err != nil {
			p.Stop()
			return err
		}
	}
	return nil
}

// Version is the line that a program says of itself: the first one with its name.
func Version(program, flag string) string {
	out, _ := exec.Command(program, flag).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(strings.ToLower(line), program) {
			return strings.TrimSpace(line)
		}
	}
	return program
}

// certificates makes a CA and two leaves, as our own are: ECDSA P-256.
func (g *Ground) certificates() error {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench CA"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(g.Dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return err
	}
	for i, name := range []string{"client", "server"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(int64(2 + i)), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name + ".bench.test"},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
		if err != nil {
			return err
		}
		secret, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})...)
		if err := os.WriteFile(filepath.Join(g.Dir, name+".pem"), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}
