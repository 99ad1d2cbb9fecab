// Command fleet holds N simulated proxies on one real issuer and measures how
// long an edit of the policy files takes to be in force on every one of them.
//
// Each proxy is a node of its own, attested with a join token, with a mutual
// TLS connection of its own and the client that a sidecar has. It receives each
// snapshot, compares its revisions and its hash with what the issuer says, and
// answers; what replicas are sent alike is decoded and hashed once, and no
// policy is compiled. All of it shares the cores of this machine.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/bench/rig"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

const (
	// joiners attest at one time: the issuer lets one address have 16 calls
	// without an SVID in flight.
	joiners = 12
	// dialers connect at one time: the issuer lets one address have 1,024
	// handshakes in flight.
	dialers = 256
	// heap is how much more of it, percent, this process fills before it is
	// collected.
	heap = 400
	// bound is the longest that a run may take.
	bound = 290 * time.Second
	// window is how long the idle fleet is watched: longer than the time after
	// which a proxy says that it lives, 2 min.
	window = 150 * time.Second
)

// settings of a run.
type settings struct {
	program  string
	n        int
	services int
	edits    int
	sync     bool
	push     bool
	watch    time.Duration
	profile  string
}

func main() {
	rig.Main("bench-fleet", run, nil)
}

func run(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.program, "issuer", "bin/issuer", "the issuer's binary")
	flag.IntVar(&s.n, "n", 4000, "proxies")
	flag.IntVar(&s.services, "services", 100, "services that the proxies are replicas of")
	flag.IntVar(&s.edits, "edits", 10, "edits of each kind")
	flag.BoolVar(&s.sync, "sync", true, "fetch the entries whenever the issuer asks for it, as a sidecar does")
	flag.BoolVar(&s.push, "push", false, "push each edit as sallyport policy push does, in place of moving a file into the folder")
	flag.DurationVar(&s.watch, "idle", window, "how long the idle fleet is watched")
	flag.StringVar(&s.profile, "profile", "", "write a CPU profile of the issuer during the edits to this file")
	flag.Parse()
	if s.n < 1 || s.services < 1 || s.edits < 1 {
		return errors.New("settings: want at least one proxy, service and edit")
	}
	if err := raiseFiles(uint64(s.n) + 1000); err != nil {
		return err
	}
	// The proxies of a fleet do not share a heap: to collect this one for each
	// edit would be work that none of them has.
	debug.SetGCPercent(heap)
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	fmt.Fprintf(w, "settings: %d proxies, each a node with a join token, an SVID and a mutual TLS connection of its own; replicas of %d services, one row each; SQLite, audit on; entries fetched when asked for: %t; edits are pushed: %t; %s, GOMAXPROCS %d, proxies and issuer on the same cores; a proxy compares revisions and hash and answers, bodies that are alike are decoded once\n",
		s.n, s.services, s.sync, s.push, runtime.Version(), runtime.GOMAXPROCS(0))
	res := &rig.Result{Name: "bench-fleet", Figures: map[string]float64{"proxies": float64(s.n)}}
	if err := s.measure(ctx, w, res); err != nil {
		return err
	}
	return res.End(w, "not every proxy took every edit")
}

// raiseFiles lets this process and the issuer have a socket for each proxy.
func raiseFiles(want uint64) error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	if l.Max < want {
		return fmt.Errorf("open files: at most %d, want %d; raise ulimit -n", l.Max, want)
	}
	l.Cur = l.Max
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l)
}

func (s settings) workload(n int) spiffeid.ID {
	return spiffeid.RequireFromPathf(rig.TrustDomain, "/ns/fleet/sa/s%d", n%s.services)
}

func (s settings) files() map[string]string {
	var entries, services strings.Builder
	entries.WriteString("entries:\n")
	for n := range s.n {
		fmt.Fprintf(&entries, "  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n", s.workload(n), rig.Agent(nodeName(n)))
	}
	services.WriteString("services:\n")
	for n := range s.services {
		fmt.Fprintf(&services, "  - {name: s%d, identity: %q, port: 8443, protocol: http}\n", n, s.workload(n))
	}
	return map[string]string{
		"entries.yaml": entries.String(), "services.yaml": services.String(), "access.csv": s.access(0, 0),
		"guardrails.csv": "", "egress.yaml": "destinations: []\n",
	}
}

// access is one row for each service: its neighbour may call it. all is in
// every row, one in the first only.
func (s settings) access(all, one int) string {
	var b strings.Builder
	for n := range s.services {
		path := fmt.Sprintf("/v%d/**", all)
		if n == 0 {
			path = fmt.Sprintf("/v%d/e%d/**", all, one)
		}
		fmt.Fprintf(&b, "p, r%d, in, %s, %s, 8443, GET|POST, %s, -, allow\n", n, s.workload(n+1), s.workload(n), path)
	}
	return b.String()
}

func nodeName(n int) string { return fmt.Sprintf("p%d", n) }

// A taken says that a proxy put a policy revision in force; its ack leaves at
// the same moment.
type taken struct {
	proxy    int
	revision uint64
	at       time.Time
}

// A proxy is control.Handler.
type proxy struct {
	n      int
	client *control.Client
	fleet  *fleet
	sync   chan struct{}
}

// A fleet is all proxies and what they report.
type fleet struct {
	proxies []*proxy
	took    chan taken
	syncs   atomic.Int64
	faults  atomic.Int64
	fault   atomic.Pointer[error]
	running sync.WaitGroup

	// mu guards decoded: what replicas of a service were sent alike.
	mu      sync.Mutex
	decoded map[[sha256.Size]byte]decoded
}

type decoded struct {
	snap *mesh.Snapshot
	hash string
}

// decode decodes and hashes a body once, however many proxies are sent it: as
// if each were on a machine of its own, beside this one's cores.
func (f *fleet) decode(body []byte) (*mesh.Snapshot, string, error) {
	sum := sha256.Sum256(body)
	f.mu.Lock()
	defer f.mu.Unlock()
	if d, ok := f.decoded[sum]; ok {
		return d.snap, d.hash, nil
	}
	snap, err := mesh.DecodeSnapshot(body)
	if err != nil {
		return nil, "", err
	}
	if f.decoded == nil || len(f.decoded) > 1000 {
		f.decoded = map[[sha256.Size]byte]decoded{}
	}
	d := decoded{snap, snap.ContentHash()}
	f.decoded[sum] = d
	return d.snap, d.hash, nil
}

func (f *fleet) failed(err error) {
	f.faults.Add(1)
	f.fault.CompareAndSwap(nil, &err)
}

// OnSnapshot takes what was pushed.
func (p *proxy) OnSnapshot(_ context.Context, s *mesh.Snapshot) error {
	p.fleet.took <- taken{p.n, s.PolicyRevision, time.Now()}
	return nil
}

// OnSyncNow has the entries fetched, beside the stream.
func (p *proxy) OnSyncNow(context.Context) {
	select {
	case p.sync <- struct{}{}:
	default:
	}
}

// OnCandidate tries nothing.
func (p *proxy) OnCandidate(context.Context, *mesh.Snapshot) error { return nil }

// OnRevoked has nothing to close.
func (p *proxy) OnRevoked(context.Context, []mesh.RevokedSVID) {}

// follow is subscribed until ctx ends; up is called once when it is.
func (p *proxy) follow(ctx context.Context, s settings, up func()) {
	up = sync.OnceFunc(up)
	hello := control.Hello{Kind: control.KindSidecar, Workload: s.workload(p.n), Decode: p.fleet.decode, OnState: func(err error) {
		if err != nil && ctx.Err() == nil {
			p.fleet.failed(err)
		}
		up()
	}}
	p.fleet.running.Go(func() { _ = p.client.Subscribe(ctx, hello, p) })
	p.fleet.running.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-p.sync:
			}
			if !s.sync {
				continue
			}
			switch _, err := p.client.SyncEntries(ctx); {
			case err == nil:
				p.fleet.syncs.Add(1)
			case ctx.Err() == nil:
				p.fleet.failed(err)
			}
		}
	})
}
