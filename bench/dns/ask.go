package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"sallyport/bench/rig"
)

// A sample is what a server did in one round.
type sample struct {
	sent    int64
	bad     int64 // not answered, or not as it must be
	seconds float64
	busy    time.Duration
	rss     float64 // MB
	// p50 and p99 are microseconds, where latency is measured.
	p50, p99 float64
}

func (s sample) perSecond() float64 { return float64(s.sent-s.bad) / s.seconds }

// cpu is the seconds that the server computed for 100,000 questions.
func (s sample) cpu() float64 { return s.busy.Seconds() / float64(s.sent) * 1e5 }

// ask puts a server under a scene.
func (b *bench) ask(ctx context.Context, p *server, sc scene) (sample, error) {
	pids := p.proc.PIDs(false)
	before, err := rig.CPUOf(pids...)
	if err != nil {
		return sample{}, err
	}
	args := []string{"-l", strconv.Itoa(int(b.each.Seconds()))}
	if sc.rate {
		args = append(args, "-Q", strconv.Itoa(b.rate), "-v")
	}
	one, err := b.perf(ctx, p, sc, args...)
	if err != nil {
		return sample{}, err
	}
	after, err1 := rig.CPUOf(pids...)
	rss, err2 := rig.RSSOf(pids...)
	one.busy, one.rss = after-before, rss
	return one, errors.Join(err1, err2)
}

var (
	sentLine = regexp.MustCompile(`(?m)^\s*Queries sent:\s+(\d+)`)
	lostLine = regexp.MustCompile(`(?m)^\s*Queries lost:\s+(\d+)`)
	timeLine = regexp.MustCompile(`(?m)^\s*Run time \(s\):\s+([0-9.]+)`)
	codes    = regexp.MustCompile(`([A-Z]+) (\d+) \(`)
	answered = regexp.MustCompile(`(?m)^> \w+ \S+ A ([0-9.]+)$`)
)

// perf runs dnsperf and reads what it says.
func (b *bench) perf(ctx context.Context, p *server, sc scene, more ...string) (one sample, err error) {
	args := append([]string{"-s", "127.0.0.1", "-p", p.port, "-d", filepath.Join(b.Dir, sc.questions), "-c", "4", "-T", "1", "-q", "100"}, more...)
	if sc.edns {
		args = append(args, "-e")
	}
	out, err := exec.CommandContext(ctx, "dnsperf", args...).CombinedOutput()
	if err != nil {
		return one, fmt.Errorf("dnsperf: %w: %s", err, last(out))
	}
	number := func(re *regexp.Regexp) float64 {
		m := re.FindSubmatch(out)
		if m == nil {
			err = fmt.Errorf("dnsperf says nothing of %s: %s", re, last(out))
			return 0
		}
		v, _ := strconv.ParseFloat(string(m[1]), 64)
		return v
	}
	one.sent, one.seconds = int64(number(sentLine)), number(timeLine)
	one.bad = int64(number(lostLine))
	if err != nil {
		return one, err
	}
	// Which question had which answer is not told: the shares must be right, to
	// the rest of a last turn through the file.
	got := map[string]int64{}
	for _, m := range codes.FindAllSubmatch(out, -1) {
		n, _ := strconv.ParseInt(string(m[2]), 10, 64)
		got[string(m[1])] += n
	}
	one.bad += one.sent - one.bad - got["NOERROR"] - got["NXDOMAIN"]
	if share := float64(got["NOERROR"]) / float64(max(1, got["NOERROR"]+got["NXDOMAIN"])); math.Abs(share-sc.allowed) > 0.01 {
		one.bad = one.sent
	}
	var took []float64
	for _, m := range answered.FindAllSubmatch(out, -1) {
		if v, err := strconv.ParseFloat(string(m[1]), 64); err == nil {
			took = append(took, v*1e6)
		}
	}
	one.p50, one.p99 = rig.Quantile(took, 0.5), rig.Quantile(took, 0.99)
	return one, nil
}

func last(out []byte) string {
	return strings.TrimSpace(string(bytes.TrimSpace(out[max(0, len(out)-600):])))
}

// profileOurs writes what the sidecar does under the first scene.
func (b *bench) profileOurs(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- b.servers[0].proc.Profile(ctx, b.profile, 8*time.Second) }()
	one, err := b.perf(ctx, b.servers[0], scenes[0], "-l", "10")
	fmt.Printf("%.0f questions/s\n", one.perSecond())
	return errors.Join(err, <-done)
}
