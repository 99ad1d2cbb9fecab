// Bench-handshake measures how many new connections of mutual TLS a sidecar
// takes in a second, beside nginx and HAProxy on the same cores, in turn. Each
// connection has a whole handshake of TLS 1.3, one byte and its echo from the
// application behind, and ends in order.
//
// All show SVIDs of one issuer and verify the caller's against its bundle. The
// caller says which key exchange it is. It prints what it compared, a table, and
// a line of JSON. A ratio is ours over the peer's, the median of the ratios of
// the rounds; those of connections per second are better the larger, those of
// CPU the smaller. The figure without a group is the smaller of the two groups'.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"time"

	"sallyport/bench/rig"
)

func main() {
	rig.Main("bench-handshake", measure, map[string]rig.Role{"load": rig.Load(order.run), "origin": rig.At(serveOrigin)})
}

// bound is the longest that the bench may take.
const bound = 30 * time.Minute

type settings struct {
	issuer, sidecar string
	rounds, callers int
	each, warm      time.Duration
	rules           int
	only            bool
	profile         string
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.sidecar, "sidecar", "bin/sidecar", "the sidecar's binary")
	flag.IntVar(&s.rounds, "rounds", 15, "rounds")
	flag.IntVar(&s.callers, "callers", 16, "connections at a time")
	flag.DurationVar(&s.each, "each", 600*time.Millisecond, "how long a server is measured in a round")
	flag.DurationVar(&s.warm, "warm", 200*time.Millisecond, "how long it is warmed up before")
	flag.IntVar(&s.rules, "rules", 1000, "rows of the policy")
	flag.BoolVar(&s.only, "only", false, "measure ours alone")
	flag.StringVar(&s.profile, "profile", "", "write a CPU profile of the sidecar under the first scene to this file, and measure nothing")
	flag.Parse()
	if s.rounds < 1 || s.rules < 1 || s.callers < 1 || s.each <= 0 {
		return errors.New("settings: want at least one round, one rule, one caller and some time for each")
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	ground, err := rig.NewGround()
	if err != nil {
		return err
	}
	defer ground.Close()
	b := &bench{Ground: ground, settings: s, got: map[cell][]sample{}}
	if err := b.start(ctx, w); err != nil {
		return err
	}
	if s.profile != "" {
		return b.profile(ctx)
	}
	fmt.Fprintf(w, "settings: %s, %d cores for everything; TLS 1.3, ECDSA P-256, the caller's SVID verified, no resumption; %d connections at a time; %d rounds of %s after %s of warming up\n",
		runtime.Version(), runtime.NumCPU(), s.callers, s.rounds, s.each, s.warm)
	for _, p := range b.servers {
		fmt.Fprintf(w, "  %s: %s\n", p.Name, p.Settings)
	}
	res := &rig.Result{Name: "bench-handshake", Figures: map[string]float64{}}
	if err := b.rounds(ctx, w, res); err != nil {
		return err
	}
	return res.End(w, "not every connection was carried")
}
