// Package leak tries from inside of a workload every way out that somebody would
// try who has taken it over, and says which of them lead somewhere.
//
// A witness outside tells for certain: what it answers has left. Without an
// answer a way has led nowhere, or, where protocols have no answers, the kernel
// has refused to send.
package leak

import (
	"cmp"
	"context"
	"crypto/rand"
	"net/netip"
	"slices"
	"time"
)

// Result is what became of a way.
type Result string

const (
	// Refused: nothing left, as far as can be seen from inside.
	Refused Result = "refused"
	// Leaked: something left.
	Leaked Result = "leaked"
	// Unknown: nobody answers, and nothing has refused. A firewall on the way, or
	// no witness.
	Unknown Result = "unknown"
	// Absent: this machine has no such way.
	Absent Result = "absent"
)

// An Outcome is what became of one way.
type Outcome struct {
	Way    string `json:"way"`
	Result Result `json:"result"`
	// Detail is the kernel's word, or what was answered.
	Detail string `json:"detail,omitempty"`
}

// Config says where to try to get.
type Config struct {
	// V4 and V6 are where the witness listens, in TCP and UDP. One is enough.
	V4, V6 netip.AddrPort
	// Users are tried to become, by number, such as that of the sidecar.
	Users []int
	// Timeout bounds the wait for an answer, of each way. Default 2 s.
	Timeout time.Duration
	// Self runs this program again, to try one way after a change that cannot be
	// taken back. Without it such ways are not tried.
	Self []string
}

// A way is one of those that are tried.
type way struct {
	name string
	try  func(ctx context.Context, t *trial) (Result, string)
}

// A trial is what ways share.
type trial struct {
	Config
	nonce string
}

// Names are the ways that Try tries, in their order.
func Names() (out []string) {
	for _, w := range ways() {
		out = append(out, w.name)
	}
	return out
}

// A Report is what became of all ways that were tried.
type Report struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"` // every way that is there was refused
	Cases struct {
		Tried   int `json:"tried"`
		Passed  int `json:"passed"`
		Failed  int `json:"failed"`
		Skipped int `json:"skipped"`
	} `json:"cases"`
	Ways []Outcome `json:"ways"`
}

// Try tries the ways of these names, all without any.
func Try(ctx context.Context, c Config, only ...string) *Report {
	c.Timeout = cmp.Or(c.Timeout, 2*time.Second)
	t := &trial{Config: c, nonce: rand.Text()}
	r := &Report{Name: "leak-test"}
	for _, w := range ways() {
		if len(only) > 0 && !slices.Contains(only, w.name) {
			continue
		}
		o := Outcome{Way: w.name}
		o.Result, o.Detail = w.try(ctx, t)
		r.Ways = append(r.Ways, o)
		switch o.Result {
		case Refused:
			r.Cases.Tried++
			r.Cases.Passed++
		case Leaked, Unknown:
			r.Cases.Tried++
			r.Cases.Failed++
		case Absent:
			r.Cases.Skipped++
		}
	}
	r.OK = r.Cases.Failed == 0 && r.Cases.Tried > 0
	return r
}
