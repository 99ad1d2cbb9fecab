package main

import (
	"context"
	"fmt"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

// An svidWatch counts how often the SVID of each proxy is replaced.
type svidWatch struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex     // guards count
	count map[string]int // by proxy name
}

// watchSVIDs asks the issuer twice a second, until stop.
func watchSVIDs(ctx context.Context, admin *control.Admin) *svidWatch {
	ctx, cancel := context.WithCancel(ctx)
	w := &svidWatch{cancel: cancel, done: make(chan struct{}), count: map[string]int{}}
	go func() {
		defer close(w.done)
		last := map[string]time.Time{}
		for ctx.Err() == nil {
			ps, _ := admin.Proxies(ctx) // while the issuer is down there is no answer
			for _, p := range ps {
				name := path.Base(p.Workload.Path())
				if old, seen := last[name]; seen && p.SVIDExpires.After(old) {
					w.mu.Lock()
					w.count[name]++
					w.mu.Unlock()
				}
				last[name] = p.SVIDExpires
			}
			select {
			case <-ctx.Done():
			case <-time.After(500 * time.Millisecond):
			}
		}
	}()
	return w
}

// all says whether each of them was renewed.
func (w *svidWatch) all(names []string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range names {
		if w.count[n] == 0 {
			return false
		}
	}
	return true
}

// stop ends the watch and returns the counts.
func (w *svidWatch) stop() map[string]int {
	w.cancel()
	<-w.done
	return w.count
}

// watchPolicy prints what becomes of each edit of the policy files.
func (p *decisionPrinter) watchPolicy(ctx context.Context) {
	admin, err := control.DialAdmin(p.d.apiSocket())
	if err != nil {
		return
	}
	defer admin.Close()
	var last mesh.IssuerStatus
	for ctx.Err() == nil {
		st, err := admin.Status(ctx)
		if err == nil && last.PolicyRevision != 0 {
			switch {
			case st.PolicyRevision != last.PolicyRevision:
				p.say(fmt.Sprintf("policy revision %d is in force", st.PolicyRevision))
			case st.LastRefusal != "" && st.LastRefusal != last.LastRefusal:
				p.say(fmt.Sprintf("policy edit REFUSED, revision %d stays in force:\n%s", st.PolicyRevision, indent(indent(st.LastRefusal))))
			}
		}
		if err == nil {
			last = st
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (p *decisionPrinter) say(text string) { p.line(time.Now().Format("15:04:05") + "  " + text) }

// line prints what is no decision.
func (p *decisionPrinter) line(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.d.out, "  %s\n", text)
}

// A decisionPrinter writes decisions, one line each.
type decisionPrinter struct {
	d *demo
	// muted has decisions pass unprinted.
	muted atomic.Bool

	mu   sync.Mutex // guards seen and the output
	seen map[string]time.Time
}

func (p *decisionPrinter) print(line []byte) {
	r, _, err := audit.ParseLine(line)
	if err != nil || r.Decision == "" || p.muted.Load() {
		return
	}
	why := r.Rule
	if why == "" {
		why = r.Reason
	}
	if r.Kind == audit.KindRollup {
		why = fmt.Sprintf("%s: %d %s", why, r.Count, r.Class)
	}
	text := fmt.Sprintf("%-5s  %-10s -> %-22s %-7s %-18s %s", r.Decision, demoName(r.Src), demoName(r.Dst), r.Verb, r.Path, why)
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.seen[text]) < time.Second {
		return
	}
	p.seen[text] = time.Now()
	fmt.Fprintf(p.d.out, "  %s  %s  %s\n", r.Time.Local().Format("15:04:05"), text, r.ID)
}

// demoName shortens an identity to its last segment.
func demoName(s string) string {
	if s == "" {
		return "nobody" // who proved no identity has no name
	}
	if strings.HasPrefix(s, "spiffe://") {
		return path.Base(s)
	}
	return strings.TrimPrefix(s, "host:")
}
