// Package nameserver answers the DNS questions of workloads, by the policy and
// without asking anybody: an allowed name has a virtual address, everything else
// does not exist. Nothing that a workload puts into a question leaves the
// machine, unless the name is one that is answered with real addresses.
//
// Names says what a name means to a workload. A Server answers over sockets: the
// common question from a table made once for each name, all else by way of
// miekg/dns. Questions in flight and the writing of records are in goroutines
// that Run owns.
package nameserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
	"sallyport/internal/virtual"
)

const (
	// virtualTTL is how long a virtual address may be remembered, in seconds; it
	// does not change, but the right to the name may end.
	virtualTTL = 30
	// negativeTTL is for how long a name may be taken for absent.
	negativeTTL = 5
	// maxSize is the most that an answer over UDP has: what passes everywhere
	// without fragments.
	maxSize = 1232
)

// Config is what Names needs.
type Config struct {
	// Book has the virtual addresses. Required.
	Book *virtual.Book
	// Record keeps an audit record. Required.
	Record func(*audit.Record) error
	// Log receives what went wrong. Required.
	Log *slog.Logger
	// Metrics counts questions. Default: nothing is counted.
	Metrics *telemetry.Registry
	// Tracer keeps spans of answers. Default: none is kept.
	Tracer *telemetry.Tracer
	// IPv4Only leaves virtual addresses of IPv6 out.
	IPv4Only bool
	// Mesh answers for the services of the mesh. Endpoints answers for their
	// endpoints, too, where connections to these are carried.
	Mesh, Endpoints bool
	// Search are the suffixes that the workload's resolver appends to names. What
	// is refused for such a suffix alone is no attempt at anything.
	Search []string
	// PerPattern is how many names below one pattern a workload may invent in a
	// day. Default 1024. Label is the longest label that may stand for the star
	// of a pattern. Default 63, as long as a label can be.
	PerPattern, Label int
	// Rate is how many questions a second one workload may ask, and how many at
	// once; what is beyond gets no answer. Default: any number.
	Rate int
	// Real finds the addresses of a name that the policy has answered with real
	// ones, as far as they may be dialled, and for how long they may be
	// remembered. ErrAbsent says that there is none, ErrBudget that the workload may
	// know no more of them. Without it nobody is answered so.
	Real func(ctx context.Context, who spiffeid.ID, name string) ([]netip.Addr, time.Duration, error)
}

var (
	// ErrAbsent is returned by Config.Real for a name without an address.
	ErrAbsent = errors.New("the name has no address")
	// ErrBudget is returned by Config.Real for a name beyond a budget.
	ErrBudget = errors.New("the budget of names is used up")
)

// Validate reports every mistake by field name.
func (c Config) Validate() error {
	var errs []error
	for name, missing := range map[string]bool{"book": c.Book == nil, "record": c.Record == nil, "log": c.Log == nil} {
		if missing {
			errs = append(errs, errors.New(name+": missing"))
		}
	}
	return errors.Join(errs...)
}

// Names says what a name means to a workload. It is safe for concurrent use.
type Names struct {
	cfg  Config
	zone atomic.Pointer[zone]
	ledger

	probing sync.Mutex             // held while the self-test asks
	token   atomic.Pointer[string] // what only this process answers; nil when nothing is asked

	mu      sync.Mutex // guards budgets
	budgets map[spiffeid.ID]*budget
}

// New makes Names without a policy, which answer nobody.
func New(cfg Config) (*Names, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("nameserver: %w", err)
	}
	cfg.PerPattern = cmp.Or(cfg.PerPattern, 1024)
	cfg.Label = cmp.Or(cfg.Label, 63)
	n := &Names{cfg: cfg, budgets: map[spiffeid.ID]*budget{}}
	n.ledger.open(cfg)
	return n, nil
}

// Use puts a policy in force.
func (n *Names) Use(snap *mesh.Snapshot, set *authz.Set) {
	n.zone.Store(newZone(snap, set, n.cfg.Search))
}

func (n *Names) counter(r Result) *telemetry.Counter { return n.cfg.Metrics.Names(string(r)) }

// Run writes records and addresses down until ctx ends.
func (n *Names) Run(ctx context.Context) error {
	n.ledger.run(ctx, func() {
		if err := n.cfg.Book.Save(); err != nil {
			n.cfg.Log.Error("virtual addresses of invented names do not last over a restart", "err", err)
		}
	})
	return nil
}

// A budget is what a workload has asked and invented since a moment.
type budget struct {
	next   atomic.Int64  // when the rate is used up no more, in Unix nanoseconds
	beyond atomic.Uint64 // questions beyond the rate that are not in a record yet

	mu    sync.Mutex // guards what follows
	since time.Time
	used  map[string]int // names below a pattern
}

const (
	// budgetEvery is after how long a budget is whole again.
	budgetEvery = 24 * time.Hour
	// maxBudgets bounds for how many workloads budgets are kept.
	maxBudgets = 1 << 14
	// maxPatterns bounds the patterns below which names are counted.
	maxPatterns = 1 << 10
	// anyPattern is that of names which no row allows and the mode lets pass: the
	// workload chooses what they end in. There may be as many as below lenientFor
	// patterns.
	anyPattern = "*"
	lenientFor = 8
)

func (n *Names) budgetOf(who spiffeid.ID) *budget {
	n.mu.Lock()
	defer n.mu.Unlock()
	b := n.budgets[who]
	if b == nil {
		if len(n.budgets) >= maxBudgets {
			clear(n.budgets)
		}
		b = &budget{used: map[string]int{}}
		n.budgets[who] = b
	}
	return b
}

// spend takes one name below a pattern, if there is one left. What stands below
// more patterns than a policy has any use for is not told apart.
func (b *budget) spend(pattern string, most int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); now.Sub(b.since) >= budgetEvery {
		b.since = now
		clear(b.used)
	}
	if _, known := b.used[pattern]; !known && len(b.used) >= maxPatterns {
		pattern = anyPattern
	}
	if b.used[pattern] >= most {
		return false
	}
	b.used[pattern]++
	return true
}

// may says whether a workload may ask one more question now.
func (n *Names) may(who spiffeid.ID, b *budget) bool {
	if n.cfg.Rate == 0 {
		return true
	}
	now, step := time.Now().UnixNano(), int64(time.Second)/int64(n.cfg.Rate)
	for {
		was := b.next.Load()
		next := max(was, now-int64(time.Second)) + step // of a second, all at once
		if next > now {
			n.counter(TooMany).Inc()
			n.ledger.beyond(who, b)
			return false
		}
		if b.next.CompareAndSwap(was, next) {
			return true
		}
	}
}

// refund gives back a name that got no address.
func (b *budget) refund(pattern string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used[pattern] > 0 {
		b.used[pattern]--
	}
}
