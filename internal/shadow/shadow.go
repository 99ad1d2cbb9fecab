// Package shadow copies calls to backends whose answers reach nobody, compares
// these answers with the primary's, and hands joined records to an archive.
//
// A Copy watches an exchange as a Tee: it takes the bytes as they pass, into
// bounded memory and then, sealed, into a file, and waits for nothing. When the
// call is over the copy waits for its turn in the lane of its shadow, a bounded
// queue that is served by few goroutines, which end with the last call of it.
// What finds no room is dropped and counted, if it can be before anything of the
// call is kept. Run owns the goroutine that writes
// files; nothing here can delay or change the call that is copied.
package shadow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"sallyport/internal/archive"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
	"sallyport/internal/telemetry"
)

// Config is what a Mirror needs.
type Config struct {
	Limits
	// Dir is where files of copies are made; they have no name there once they
	// are open, and only this process can read them. Required.
	Dir string
	// Lend gives a connection to a backend. Required.
	Lend func(ctx context.Context, to mesh.Backend, fresh bool) (Line, error)
	// Archive keeps a joined record in the archive of a name. It may take its
	// time, but not for ever. Optional.
	Archive func(name string, r *archive.Record)
	// Redact is what no report may show.
	Redact *archive.Redactor
	// Tracer keeps the spans of copies whose trace is kept. Optional.
	Tracer *telemetry.Tracer
	// Metrics counts what became of copies. Optional.
	Metrics *telemetry.Registry
	// Log is for operators. Required.
	Log *slog.Logger
}

// Limits bound what copies may cost. The zero value means the defaults.
type Limits struct {
	// Memory is what all copies together hold in memory, bytes. Default 64 MiB.
	Memory int64 `yaml:"memory"`
	// Spill is what they hold in files, bytes. Default 1 GiB; -1 for none.
	Spill int64 `yaml:"spill"`
	// Message is the largest request, and the largest answer, that is copied,
	// bytes. Default 64 MiB.
	Message int64 `yaml:"message"`
	// Concurrency is how many calls of a shadow run at once. Default 8.
	Concurrency int `yaml:"concurrency"`
	// Queue is how many copies wait for that, besides. Default 64.
	Queue int `yaml:"queue"`
	// Timeout of a call to a shadow, from its turn to the end of the answer.
	// Default 10 s.
	Timeout time.Duration `yaml:"timeout"`
}

// Validate reports every mistake by field name.
func (l Limits) Validate() error {
	var errs []error
	for name, n := range map[string]int64{"memory": l.Memory, "message": l.Message, "concurrency": int64(l.Concurrency), "queue": int64(l.Queue), "timeout": int64(l.Timeout)} {
		if n < 0 {
			errs = append(errs, fmt.Errorf("%s: is negative", name))
		}
	}
	if l.Spill < -1 {
		errs = append(errs, fmt.Errorf("spill: %d is neither a number of bytes nor -1 for none", l.Spill))
	}
	return errors.Join(errs...)
}

func (l Limits) withDefaults() Limits {
	l.Memory = cmp.Or(l.Memory, 64<<20)
	l.Spill = max(cmp.Or(l.Spill, 1<<30), 0)
	l.Message = cmp.Or(l.Message, 64<<20)
	l.Concurrency = cmp.Or(l.Concurrency, 8)
	l.Queue = cmp.Or(l.Queue, 64)
	l.Timeout = cmp.Or(l.Timeout, 10*time.Second)
	return l
}

// A Line is a connection that is lent. Done gives it back, to be used again or
// to be closed.
type Line struct {
	Conn   *http1.Conn
	Reused bool
	Done   func(again bool)
}

// What becomes of a copy: the values of a metric.
const (
	outcomeAnswered    = "answered"
	outcomeTimeout     = "timeout"
	outcomeUnreachable = "unreachable"
	outcomeFailed      = "failed"     // no answer, or none that can be read
	outcomeTooLarge    = "too_large"  // dropped: larger than Message
	outcomeNoRoom      = "no_room"    // dropped: memory or files were full
	outcomeQueueFull   = "queue_full" // dropped: the shadow is slower than its calls
	outcomeCut         = "cut"        // dropped: the call ended before its request did
	outcomeStopped     = "stopped"    // dropped: the proxy ends
	outcomeSkipped     = "skipped"    // none was made: the call is one of a shadow
)

// A Mirror makes copies and sends them.
type Mirror struct {
	cfg    Config
	memory *mux.Budget
	disk   *mux.Budget
	spills chan *tape
	report Reports
	heavy  sync.Mutex // held while a large call is looked at

	mu    sync.Mutex // guards the fields below
	lanes map[laneKey]*lane
	ctx   context.Context // of Run; nil before, and after
}

// New returns a Mirror that drops all copies until it runs.
func New(cfg Config) (*Mirror, error) {
	errs := []error{cfg.Validate()}
	for name, missing := range map[string]bool{"dir": cfg.Dir == "", "lend": cfg.Lend == nil, "log": cfg.Log == nil} {
		if missing {
			errs = append(errs, errors.New(name+": missing"))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("shadow: %w", err)
	}
	cfg.Limits = cfg.withDefaults()
	if cfg.Redact == nil {
		cfg.Redact = archive.NewRedactor(archive.RedactConfig{})
	}
	return &Mirror{
		cfg: cfg, memory: mux.NewBudget(cfg.Memory), disk: mux.NewBudget(cfg.Spill),
		spills: make(chan *tape, 1024), lanes: map[laneKey]*lane{},
	}, nil
}

// Run writes to files what does not stay in memory, until ctx ends; then it
// waits for the calls to shadows, which end with it.
func (m *Mirror) Run(ctx context.Context) error {
	m.mu.Lock()
	m.ctx = ctx
	m.mu.Unlock()
	for {
		select {
		case t := <-m.spills:
			t.spill()
		case <-ctx.Done():
			m.stop()
			return nil
		}
	}
}

// stop drops what waits, and waits for what runs.
func (m *Mirror) stop() {
	m.mu.Lock()
	m.ctx = nil
	lanes := m.lanes
	m.lanes = map[laneKey]*lane{}
	m.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, l := range lanes {
			l.close()
		}
	}()
	for { // who runs may wait for a file
		select {
		case t := <-m.spills:
			t.spill()
		case <-done:
			return
		}
	}
}

// A Call is what is known of a call beside its bytes.
type Call struct {
	// Service is what was called, by Route; Src and Dst are the ends.
	Service         mesh.ServiceName
	Route, Src, Dst string
	Method, Path    string
	Trace           telemetry.Trace
	Start           time.Time
}

// Copyable says whether a shadow takes calls of this method.
func Copyable(s *mesh.Shadow, method []byte) bool {
	if s.Writes {
		return string(method) != "CONNECT" && string(method) != "TRACE"
	}
	return Safe(method)
}

// Safe says whether a call of this method changes nothing (RFC 9110 section
// 9.2.1).
func Safe(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS":
		return true
	}
	return false
}

// Skip counts that a call was not copied since it is one of a shadow.
func (m *Mirror) Skip(shadows []*mesh.Shadow) {
	for _, s := range shadows {
		m.count(s, outcomeSkipped)
	}
}

func (m *Mirror) count(s *mesh.Shadow, outcome string) {
	m.cfg.Metrics.Shadow(s.Name, outcome).Inc()
}
