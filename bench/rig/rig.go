// Package rig starts a real issuer for a bench and joins nodes to it over real
// mutual TLS. It measures nothing by itself.
//
// An Issuer owns the process; whoever starts it calls Close. The rig keeps no
// goroutine but the one that waits for the process.
package rig

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/policyset"
)

// TrustDomain of the benches.
var TrustDomain = spiffeid.RequireTrustDomainFromString("bench.test")

const (
	// patience bounds the start and the end of the issuer.
	patience = 60 * time.Second
	// tick is the unit of CPU time in /proc, USER_HZ.
	tick = 10 * time.Millisecond
)

// Config says which issuer to start.
type Config struct {
	// Program is the issuer's binary. Required.
	Program string
	// Database is a PostgreSQL URL. Default: SQLite.
	Database string
	// Files are the policy files by name. Required.
	Files map[string]string
	// Pushed has the issuer take its policies by Push, Files the first.
	Pushed bool
	// Pprof has the issuer serve profiles, for Profile.
	Pprof bool
}

// An Issuer is a running process of cmd/issuer in a directory of its own.
type Issuer struct {
	*Process // nil before Run

	cfg     Config
	dir     string
	address string
	roots   []*x509.Certificate
	// pushed is the revision of the last set, set its hash.
	pushed uint64
	set    string
	// Admin speaks to its admin socket.
	Admin *control.Admin
}

// Start starts an issuer and waits until it answers.
func Start(ctx context.Context, cfg Config) (_ *Issuer, err error) {
	i := &Issuer{cfg: cfg}
	if i.dir, err = os.MkdirTemp("", "spb-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	if i.address, err = FreePort(); err != nil {
		return nil, err
	}
	if err = os.Mkdir(i.policies(), 0o700); err != nil {
		return nil, err
	}
	for name, text := range cfg.Files {
		if err = i.WritePolicy(name, text); err != nil {
			return nil, err
		}
	}
	source := "policies: " + i.policies()
	if cfg.Pushed {
		source = "policy: {source: pushed}"
	}
	conf := fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nlisten: %s\n%s\n", TrustDomain.Name(), i.path("data"), i.address, source)
	if err = os.WriteFile(i.path("config.yaml"), []byte(conf), 0o600); err != nil {
		return nil, err
	}
	if i.Admin, err = control.DialAdmin(i.path("data", "run", "api.sock")); err != nil {
		return nil, err
	}
	if err = i.Run(ctx); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(i.path("data", "bundle.pem"))
	if err != nil {
		return nil, err
	}
	i.roots, err = control.ParseBundle(text)
	return i, err
}

func (i *Issuer) path(parts ...string) string {
	return filepath.Join(append([]string{i.dir}, parts...)...)
}

func (i *Issuer) policies() string { return i.path("policies") }

// WritePolicy puts a policy file in place in one step, as an edit is made.
func (i *Issuer) WritePolicy(name, text string) error {
	tmp, file := i.path("edit-"+filepath.Base(name)), filepath.Join(i.policies(), name)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// Push pushes the policy files as they are, as sallyport policy push does.
func (i *Issuer) Push(ctx context.Context) error {
	files, err := policyset.Pack(os.DirFS(i.policies()))
	if err != nil {
		return err
	}
	set, err := policyset.New(policyset.Set{
		TrustDomain: TrustDomain, Revision: i.pushed + 1, Previous: i.set, Created: time.Now().UTC().Truncate(time.Second), Files: files,
	})
	if err != nil {
		return err
	}
	i.pushed, i.set = set.Revision, set.Hash()
	return i.Admin.PushPolicy(ctx, control.PolicyPush{Set: set.Encode()})
}

// Run starts the process, anew after Stop, and waits until it answers.
func (i *Issuer) Run(ctx context.Context) error {
	args := []string{"run", "--config", i.path("config.yaml")}
	if i.cfg.Pprof {
		args = append(args, "--pprof")
	}
	var env []string
	if i.cfg.Database != "" {
		env = append(env, "SALLYPORT_DATABASE_URL="+i.cfg.Database)
	}
	var err error
	if i.Process, err = spawn(i.dir, "issuer", env, append([]string{i.cfg.Program}, args...)...); err != nil {
		return err
	}
	i.admin = i.path("data", "run", "admin.sock")
	i.patience = patience // thousands may hang on it
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		st, err := i.Admin.Status(ctx)
		if err == nil && st.PolicyRevision == 0 && i.cfg.Pushed {
			if err := i.Push(ctx); err != nil {
				return err
			}
			continue
		}
		if err == nil && st.PolicyRevision > 0 && i.listens() {
			return nil
		}
		select {
		case <-i.done:
			return fmt.Errorf("the issuer ended at its start:\n%s", i.Log())
		case <-ctx.Done():
			return fmt.Errorf("the issuer does not answer:\n%s", i.Log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (i *Issuer) listens() bool {
	c, err := net.Dial("tcp", i.address)
	if err != nil {
		return false
	}
	return c.Close() == nil
}

// Close stops the issuer and removes its directory.
func (i *Issuer) Close() error {
	if i.Process != nil {
		i.Stop()
	}
	if i.Admin != nil {
		_ = i.Admin.Close()
	}
	return os.RemoveAll(i.dir)
}

// CPU is the time that the issuer's process has computed, in steps of 10 ms.
func (i *Issuer) CPU() (time.Duration, error) { return CPUOf(i.PIDs(false)...) }

// OwnCPU is the time that this process has computed.
func OwnCPU() (time.Duration, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, err
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}

// RSS is the memory that the issuer's process has, MB of 10^6 bytes.
func (i *Issuer) RSS() (float64, error) { return RSSOf(i.PIDs(false)...) }

// Agent is the identity of the node of that name.
func Agent(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(TrustDomain, "/spire/agent/join_token/"+name)
}

// Join attests a node with a fresh join token and returns its client, which
// has connections of its own.
func (i *Issuer) Join(ctx context.Context, name string) (*control.Client, error) {
	token, err := i.Admin.CreateJoinToken(ctx, name, 10*time.Minute)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	var held atomic.Pointer[tls.Certificate]
	c, err := control.Dial(control.ClientConfig{
		Addresses: []string{i.address}, TrustDomain: TrustDomain, Log: slog.New(slog.DiscardHandler),
		Bundle:   func() []*x509.Certificate { return i.roots },
		Identity: func() (*tls.Certificate, error) { return held.Load(), nil },
	})
	if err != nil {
		return nil, err
	}
	svid, err := c.Attest(ctx, "join_token", []byte(token.Value), key)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	held.Store(certificate(key, svid.Chain))
	return c, nil
}

// Identity joins a node that has one entry, and gives the SVID of that entry.
func (i *Issuer) Identity(ctx context.Context, node string) (*tls.Certificate, error) {
	c, err := i.Join(ctx, node)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	entries, err := c.SyncEntries(ctx)
	if err != nil {
		return nil, err
	}
	if len(entries) != 1 {
		return nil, fmt.Errorf("node %s has %d entries, want one", node, len(entries))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	got, err := c.NewX509SVIDs(ctx, []control.SVIDRequest{{EntryID: entries[0].ID, ID: entries[0].SPIFFEID, Key: key}})
	if err != nil {
		return nil, err
	}
	if got[0].Err != nil {
		return nil, got[0].Err
	}
	return certificate(key, got[0].Chain), nil
}

func certificate(key *ecdsa.PrivateKey, chain []*x509.Certificate) *tls.Certificate {
	cert := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, link := range chain {
		cert.Certificate = append(cert.Certificate, link.Raw)
	}
	return cert
}

// Roots are the certificates of its trust domain.
func (i *Issuer) Roots() []*x509.Certificate { return i.roots }

// ports are tried once each, below the range from which the kernel takes ports for
// outgoing connections (ip-sysctl: ip_local_port_range): nothing else takes one
// between here and the program that is told to listen on it.
var ports atomic.Uint32

// FreePort is a loopback address that nothing listens on.
func FreePort() (string, error) {
	for range 1000 {
		addr := fmt.Sprintf("127.0.0.1:%d", 20000+(uint32(os.Getpid())*61+ports.Add(1))%12000)
		if l, err := net.Listen("tcp", addr); err == nil {
			return addr, l.Close()
		}
	}
	return "", errors.New("no port is free from 20000 to 32000; next: end what listens there")
}

// Cases counts what was tried.
type Cases struct {
	Tried  int64 `json:"tried"`
	Passed int64 `json:"passed"`
	Failed int64 `json:"failed"`
}

// A Verdict is one fact that must hold.
type Verdict struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// A Result is the last line of a bench.
type Result struct {
	Name     string             `json:"name"`
	OK       bool               `json:"ok"`
	Cases    Cases              `json:"cases"`
	Figures  map[string]float64 `json:"figures"`
	Verdicts []Verdict          `json:"verdicts,omitempty"`
}

// End writes the result as one line, without the figures that are no number. The error is bad unless cases were tried,
// none failed, and every verdict holds.
func (r *Result) End(w io.Writer, bad string) error {
	r.OK = r.Cases.Tried > 0 && r.Cases.Failed == 0 && !slices.ContainsFunc(r.Verdicts, func(v Verdict) bool { return !v.OK })
	for k, v := range r.Figures {
		if math.IsInf(v, 0) || math.IsNaN(v) { // of a peer that has answered nothing
			delete(r.Figures, k)
			continue
		}
		r.Figures[k], _ = strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err = fmt.Fprintf(w, "%s\n", b); err == nil && !r.OK {
		err = errors.New(bad)
	}
	return err
}

// Quantile returns the value below which the part q of the list lies. It sorts
// the list; an empty one gives 0.
func Quantile(list []float64, q float64) float64 {
	if len(list) == 0 {
		return 0
	}
	slices.Sort(list)
	return list[min(len(list)-1, int(q*float64(len(list))))]
}
