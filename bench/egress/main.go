// Bench-egress measures what tunnels out of the mesh cost: how many are set up
// in a second, how much they carry, and what idle ones hold, of a gateway beside
// Squid and tinyproxy on the same cores, in turn.
//
// Gateway and Squid show and verify SVIDs of one issuer over TLS 1.3; tinyproxy
// knows no TLS and is there for the floor. Cold is a new connection for each
// tunnel. Warm is what a client that stays has: of a gateway streams on a
// connection, of Squid the resumption of a session. It prints what it compared, a
// table, and a line of JSON. A ratio is ours over the peer's, the median of the
// ratios of the rounds; the larger the better.
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
	rig.Main("bench-egress", measure, map[string]rig.Role{"load": rig.Load(order.run), "origin": rig.At(serveOrigin)})
}

// bound is the longest that the bench may take.
const bound = 30 * time.Minute

type settings struct {
	issuer, gateway string
	rounds, callers int
	each, warm      time.Duration
	rules, idle     int
	many            bool
	profile, scene  string
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.gateway, "gateway", "bin/gateway", "the gateway's binary")
	flag.IntVar(&s.rounds, "rounds", 9, "rounds")
	flag.IntVar(&s.callers, "callers", 16, "tunnels at a time")
	flag.DurationVar(&s.each, "each", 600*time.Millisecond, "how long a proxy is measured in a round")
	flag.DurationVar(&s.warm, "warm", 200*time.Millisecond, "how long it is warmed up before")
	flag.IntVar(&s.rules, "rules", 1000, "rows of the policy, and names in the list of Squid")
	flag.IntVar(&s.idle, "idle", 10_000, "idle tunnels; 0: none")
	flag.BoolVar(&s.many, "many", true, "compare 10 rows with 10,000 and with 100,000")
	flag.StringVar(&s.profile, "profile", "", "write a CPU profile of the gateway to this file, and measure nothing")
	flag.StringVar(&s.scene, "scene", kindCold, "what is profiled: cold, warm or bulk")
	flag.Parse()
	if s.rounds < 1 || s.rules < 1 || s.callers < 1 || s.each <= 0 || s.idle < 0 {
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
	if err := b.start(ctx); err != nil {
		return err
	}
	if s.profile != "" {
		return b.profileTo(ctx, s.profile)
	}
	fmt.Fprintf(w, "settings: %s, %d cores for everything; TLS 1.3, X25519, ECDSA P-256; %d tunnels at a time; %d rounds of %s after %s of warming up\n",
		runtime.Version(), runtime.NumCPU(), s.callers, s.rounds, s.each, s.warm)
	for _, p := range b.proxies {
		fmt.Fprintf(w, "  %s: %s\n", p.name, p.settings)
	}
	res := &rig.Result{Name: "bench-egress", Figures: map[string]float64{}}
	if err := b.play(ctx, w, res); err != nil {
		return err
	}
	return res.End(w, "not every tunnel was carried")
}
