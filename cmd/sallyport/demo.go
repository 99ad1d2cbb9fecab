package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

const (
	demoTrustDomain = "demo.sallyport"
	demoSVIDLife    = 10 * time.Second
	demoReadyWithin = 30 * time.Second
	demoStopWithin  = 10 * time.Second
)

// A demoWorkload is a program that has an identity, and its sidecar.
type demoWorkload struct {
	name   string // of the program and its node
	serves bool   // it listens, and so has an inbound port
	config string // what its sidecar's configuration says besides
	grpc   bool   // it speaks gRPC, and nothing else
	env    []string
}

// demoWorkloads are the shop.
var demoWorkloads = []demoWorkload{
	{name: "billing", serves: true, config: "workload:\n  labels: version=v1\n"},
	{name: "payment", serves: true}, {name: "inventory", serves: true},
	{name: "web"}, {name: "batch"},
}

// A demo is a small mesh on this machine: real processes in a directory of
// their own, and an internet that is not one.
type demo struct {
	dir  string
	bin  string // where the four programs are
	out  io.Writer
	net  *internet
	rec  *recorder
	proc map[string]*process

	workloads []demoWorkload
	later     []demoWorkload // that come when the mesh is there already
	tokens    string         // which tokens billing believes
	every     time.Duration  // between two purchases
	rollouts  int            // that deeds have begun
	// isolated is the workload whose program knows of no proxy, and how says what
	// became of it.
	isolated, how string

	issuerAddr, gatewayAddr netip.AddrPort
	pageAddr                netip.AddrPort
	names                   netip.AddrPort // of the isolated workload
	inbound, outbound, app  map[string]netip.AddrPort
	held                    map[netip.AddrPort]io.Closer // all of these ports
}

// demoOptions are the flags of "sallyport demo".
type demoOptions struct {
	For      time.Duration
	Scenario string
	Tour     bool
	JSON     bool
	Keep     bool
}

// runDemo starts the mesh and either shows it until ctx ends, or plays the
// scenario, which with For is the tour through all of them; it prints verdicts.
func runDemo(ctx context.Context, o demoOptions, stdout, stderr io.Writer) (err error) {
	progress := stdout
	if o.JSON {
		progress = stderr
	}
	sc, err := scenarioNamed(o.Scenario)
	if err != nil {
		return err
	}
	d, err := newDemo(progress)
	if err != nil {
		return err
	}
	var left []string
	defer func() {
		left = d.stop(o.Keep)
		if len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(left, "; ")))
		}
	}()
	if o.For > 0 {
		sc = tour(o.For)
	}
	if sc == nil {
		sc = &scenario{later: []demoWorkload{secondBilling}, prepare: (*demo).live, policies: (*demo).openToDeeds}
	}
	if err := d.stage(sc); err != nil {
		return err
	}
	if err := d.start(ctx, sc); err != nil {
		return err
	}
	if err := d.printAddresses(ctx); err != nil {
		return err
	}
	if sc.play == nil {
		return d.show(ctx, o.Tour)
	}
	v := d.play(ctx, sc)
	v.add("clean exit", func() error {
		if left := d.stop(o.Keep); len(left) > 0 {
			return errors.New(strings.Join(left, "; "))
		}
		return nil
	}())
	return v.print(stdout, o.JSON)
}

func newDemo(out io.Writer) (*demo, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d := &demo{
		bin: filepath.Dir(self), out: out, rec: newRecorder(), proc: map[string]*process{},
		workloads: slices.Clone(demoWorkloads), every: 100 * time.Millisecond,
		inbound: map[string]netip.AddrPort{}, outbound: map[string]netip.AddrPort{}, app: map[string]netip.AddrPort{},
		held: map[netip.AddrPort]io.Closer{},
	}
	for _, p := range []string{"issuer", "gateway", "sidecar"} {
		if _, err := os.Stat(filepath.Join(d.bin, p)); err != nil {
			return nil, daemon.Hint(fmt.Errorf("the program %q is not beside %q", p, self), "make build")
		}
	}
	if d.dir, err = os.MkdirTemp("", "sallyport-demo-"); err != nil {
		return nil, err
	}
	return d, nil
}

// start brings the mesh up in its natural order, with what a scenario changes.
func (d *demo) start(ctx context.Context, sc *scenario) (err error) {
	if d.net, err = openInternet("api.stripe.test", "evil.test", demoPartner); err != nil {
		return fmt.Errorf("start the fake internet: %w", err)
	}
	if err := d.reserve(d.workloads, &d.issuerAddr, &d.gatewayAddr, &d.pageAddr, &d.names); err != nil {
		return err
	}
	if err := d.writePolicies(); err != nil {
		return err
	}
	if sc.policies != nil {
		if err := sc.policies(d); err != nil {
			return err
		}
	}
	if err := d.startIssuer(ctx); err != nil {
		return err
	}
	if err := d.startProxy(ctx, "gateway", d.gatewayConfig, "gateway", "run"); err != nil {
		return err
	}
	// Those who are called first: a caller that is earlier than its service is
	// told so, and the demo is about what comes after.
	for _, serves := range []bool{true, false} {
		for _, w := range d.workloads {
			if w.serves != serves {
				continue
			}
			if err := d.startSidecar(ctx, w.name); err != nil {
				return err
			}
		}
		for _, w := range d.workloads {
			if w.serves != serves {
				continue
			}
			if err := d.awaitReady(ctx, w.name); err != nil {
				return err
			}
		}
	}
	if err := d.awaitReady(ctx, "gateway"); err != nil {
		return err
	}
	if !d.rec.await("web buy", 1, demoReadyWithin) {
		return fmt.Errorf("no purchase came through within %s: %+v", demoReadyWithin, d.rec.failures("web buy"))
	}
	d.rec.begin()
	return d.startAttacker()
}

// proxies are the names of all sidecars that are there, and of the gateway.
func (d *demo) proxies() []string {
	names := []string{"gateway"}
	for _, w := range d.workloads {
		names = append(names, w.name)
	}
	for _, w := range d.later {
		if d.proc[w.name] != nil {
			names = append(names, w.name)
		}
	}
	return names
}

// reserve gives the demo and these workloads ports that are free now, and holds
// them: a program of the demo can listen there, and nobody else gets them, be it
// that the program has not begun yet, or that it begins anew.
func (d *demo) reserve(workloads []demoWorkload, more ...*netip.AddrPort) error {
	var err error
	take := func() netip.AddrPort {
		at, held, e := holdPort()
		if e != nil {
			err = errors.Join(err, fmt.Errorf("find a free port: %w", e))
			return netip.AddrPort{}
		}
		d.held[at] = held
		return at
	}
	for _, a := range more {
		*a = take()
	}
	for _, w := range workloads {
		d.outbound[w.name] = take()
		if w.serves {
			d.inbound[w.name], d.app[w.name] = take(), take()
		}
	}
	return err
}

// release gives up ports, of all that are held if none is named.
func (d *demo) release(ports ...netip.AddrPort) {
	if len(ports) == 0 {
		ports = slices.Collect(maps.Keys(d.held))
	}
	for _, at := range ports {
		if held := d.held[at]; held != nil {
			held.Close()
		}
		delete(d.held, at)
	}
}

// awaitReady waits until the program says so on its admin socket.
func (d *demo) awaitReady(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, demoReadyWithin)
	defer cancel()
	p := d.proc[name]
	for {
		if !p.running() {
			return fmt.Errorf("%s ended (%w); its last words:\n%s", name, cmp.Or(p.err, errors.New("status 0")), p.lastWords())
		}
		last := ready(ctx, d.adminSocket(name))
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; its last words:\n%s", name, last, p.lastWords())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// stop ends every process, last started first, and returns what is left. It
// may be called twice.
func (d *demo) stop(keep bool) (left []string) {
	order := []string{"issuer", "gateway"}
	for _, w := range slices.Concat(d.workloads, d.later) {
		order = append(order, w.name)
	}
	order = append(order, "attacker")
	for _, name := range slices.Backward(order) {
		if p := d.proc[name]; p != nil {
			if err := p.stop(demoStopWithin); err != nil {
				left = append(left, err.Error())
			}
			delete(d.proc, name)
		}
	}
	d.release()
	if d.net != nil {
		if err := d.net.Close(); err != nil {
			left = append(left, err.Error())
		}
		d.net = nil
	}
	if d.dir != "" && !keep {
		if err := os.RemoveAll(d.dir); err != nil {
			left = append(left, err.Error())
		}
		d.dir = ""
	}
	return left
}

// printAddresses says where everything is, and how to look at it.
func (d *demo) printAddresses(ctx context.Context) error {
	fmt.Fprintf(d.out, "\n  trust domain  %s\n  directory     %s\n  issuer        %s\n  gateway       %s\n", demoTrustDomain, d.dir, d.issuerAddr, d.gatewayAddr)
	for _, w := range d.workloads {
		if w.name == d.isolated {
			fmt.Fprintf(d.out, "  %-12s  %s\n", w.name, d.how)
			continue
		}
		fmt.Fprintf(d.out, "  %-12s  proxy %s", w.name, d.outbound[w.name])
		if w.serves {
			fmt.Fprintf(d.out, "  mTLS %s", d.inbound[w.name])
		}
		fmt.Fprintln(d.out)
	}
	if d.isolated == "" && d.how != "" {
		fmt.Fprintf(d.out, "  %s\n", d.how)
	}
	fmt.Fprintf(d.out, "\n  try: curl -x http://%s http://billing.mesh.internal/v1/report   (refused: you are not that workload)\n", d.outbound["web"])
	fmt.Fprintf(d.out, "  try: %s status --socket %s\n", filepath.Join(d.bin, "sallyport"), d.apiSocket())
	fmt.Fprintf(d.out, "  edit %s and watch\n\n", filepath.Join(d.dir, "policies", "access.csv"))
	link, err := d.pageLink(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, "  page  %s\n        (opens once; another: %s page --socket %s)\n\n", link, filepath.Join(d.bin, "sallyport"), d.apiSocket())
	return nil
}

// pageLink makes a link that opens the page.
func (d *demo) pageLink(ctx context.Context) (string, error) {
	admin, err := control.DialAdmin(d.apiSocket())
	if err != nil {
		return "", err
	}
	defer admin.Close()
	link, _, err := admin.PageLink(ctx)
	return link, err
}

// demo is "sallyport demo".
func (c *cli) demo() *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run a small mesh on this machine: real processes, real denials",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDemo(cmd.Context(), o, c.stdout, c.stderr)
		},
	}
	cmd.Flags().DurationVar(&o.For, "for", 0, "run this long, put every promise to the test, and end (default: until Ctrl-C)")
	cmd.Flags().StringVar(&o.Scenario, "scenario", "", "play one of these, and end: "+scenarioNames())
	cmd.Flags().BoolVar(&o.Tour, "tour", false, "begin with a guided tour, whose steps wait for a key")
	cmd.MarkFlagsMutuallyExclusive("for", "scenario", "tour")
	cmd.Flags().BoolVar(&o.JSON, "json", false, "print the verdicts as one line of JSON")
	cmd.MarkFlagsMutuallyExclusive("json", "tour")
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "leave the directory behind")
	return cmd
}

// demoApp is the hidden "sallyport demo-app", one program of the demo.
func (c *cli) demoApp() *cobra.Command {
	return &cobra.Command{
		Use: "demo-app NAME", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runDemoApp(cmd.Context(), args[0], c.stdout)
		},
	}
}
