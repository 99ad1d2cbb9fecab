package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

const (
	scenarioWithin = 2 * time.Minute
	scenarioEvery  = 20 * time.Millisecond // between two purchases
	stepWithin     = 20 * time.Second      // for one thing to happen in a scenario
)

// A scenario is a story that the demo plays once, and judges.
type scenario struct {
	name, about string
	takes       time.Duration     // at least
	workloads   []demoWorkload    // beside those of the shop, and before them
	later       []demoWorkload    // that join while it is played
	config      map[string]string // what sidecars' configurations say besides, by workload
	prepare     func(d *demo) error
	policies    func(d *demo) error                             // edits the policy files before anybody reads them
	play        func(ctx context.Context, d *demo, v *verdicts) // nil: it is looked at
}

// scenarios are what there is to play.
func scenarios() []scenario {
	return []scenario{canaryScenario(), badCanaryScenario(), breakerScenario(), faultScenario(), shadowScenario(), archiveScenario()}
}

func scenarioNames() string {
	var names []string
	for _, s := range scenarios() {
		names = append(names, s.name+" ("+s.about+")")
	}
	return strings.Join(names, ", ")
}

// scenarioNamed is nil for no name.
func scenarioNamed(name string) (*scenario, error) {
	if name == "" {
		return nil, nil
	}
	for _, s := range scenarios() {
		if s.name == name {
			return &s, nil
		}
	}
	return nil, usage(fmt.Errorf("there is no scenario %q; there are %s", name, scenarioNames()))
}

// stage adds to the demo what the scenario needs before it starts.
func (d *demo) stage(sc *scenario) error {
	d.every, d.later = scenarioEvery, sc.later
	d.workloads = append(slices.Clone(sc.workloads), d.workloads...)
	for i, w := range d.workloads {
		d.workloads[i].config += sc.config[w.name]
	}
	if sc.prepare != nil {
		return sc.prepare(d)
	}
	return nil
}

// play plays the scenario in the running mesh.
func (d *demo) play(ctx context.Context, sc *scenario) *verdicts {
	ctx, cancel := context.WithTimeout(ctx, sc.takes+scenarioWithin)
	defer cancel()
	v := newVerdicts(strings.TrimSpace("demo " + sc.name))
	sc.play(ctx, d, v)
	return v
}

// behave asks the program of a workload to behave in some way, and returns how
// many calls have come to it.
func (d *demo) behave(ctx context.Context, name string, m manners) (calls int64, err error) {
	b, err := json.Marshal(m)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+d.app[name].String()+"/manners", bytes.NewReader(b))
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	return calls, json.NewDecoder(resp.Body).Decode(&calls)
}

// policyFile is where a policy file of the demo is.
func (d *demo) policyFile(name ...string) string {
	return filepath.Join(append([]string{d.dir, "policies"}, name...)...)
}

// appendPolicy adds text to a policy file.
func (d *demo) appendPolicy(name, text string) error {
	b, err := os.ReadFile(d.policyFile(name))
	if err != nil {
		return err
	}
	return os.WriteFile(d.policyFile(name), append(b, text...), 0o600)
}

// enrol lets the node of that name have the identity of a workload.
func (d *demo) enrol(node, workload string) error {
	return d.appendPolicy("entries.yaml", fmt.Sprintf(`  - spiffe_id: spiffe://%[1]s/ns/shop/sa/%[3]s
    parent_id: spiffe://%[1]s/spire/agent/join_token/%[2]s
    selectors: ["child:true"]
`, demoTrustDomain, node, workload))
}

// routes puts text in force as the routes of billing, in every proxy.
func (d *demo) routes(ctx context.Context, text string) (took time.Duration, err error) {
	return d.edit(ctx, filepath.Join("routes", "billing.yaml"), []byte(text))
}

// edit writes a policy file, and waits until every proxy acts on it.
func (d *demo) edit(ctx context.Context, name string, text []byte) (took time.Duration, err error) {
	admin, err := control.DialAdmin(d.apiSocket())
	if err != nil {
		return 0, err
	}
	defer admin.Close()
	st, err := admin.Status(ctx)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := daemon.WriteFile(d.policyFile(name), text, 0o600); err != nil {
		return 0, err
	}
	err = d.awaitSynced(ctx, admin, st.PolicyRevision+1, stepWithin)
	if now, e := admin.Status(ctx); err != nil && e == nil && now.LastRefusal != "" {
		err = errors.New(now.LastRefusal)
	}
	return time.Since(start), err
}

// operator runs a command of the operator, as an operator would. One that has
// found what it looked for, and says so with its exit code, has not failed.
func (d *demo) operator(ctx context.Context, args ...string) (stdout string, err error) {
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "sallyport"), args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState.ExitCode() != daemon.Failed {
		return out.String(), fmt.Errorf("sallyport %s: %w: %.500s%.500s", strings.Join(args, " "), err, errs.String(), out.String())
	}
	return out.String(), nil
}

// recorded counts the records of a proxy's audit log that are as wanted.
func (d *demo) recorded(name string, wanted func(audit.Record) bool) (n int, err error) {
	f, err := os.Open(d.auditFile(name))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if r, _, err := audit.ParseLine(line); err == nil && wanted(r) {
			n++
		}
	}
	return n, nil
}

// until asks again until it is so.
func until(ctx context.Context, what string, so func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	for {
		ok, err := so()
		if ok && err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("it did not come to be that %s", what), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
