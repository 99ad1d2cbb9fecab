package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/capture"
	"sallyport/internal/capture/redirect"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/proxy"
)

// CaptureConfig has rules of the kernel bring the workload's connections here,
// so that a program that knows no proxy is carried too. Without users, cgroups
// or everyone nothing is captured. The rules are put into force by "sidecar
// capture install", by a user who may, and stay until "sidecar capture remove".
type CaptureConfig struct {
	redirect.Config `yaml:",inline"`
	// Hold has the running sidecar put the rules into force itself, keep others
	// off them, and follow users and cgroups that change. It needs
	// CAP_NET_ADMIN. The rules stay when it ends.
	Hold bool `yaml:"hold"`
	// Unknown is what becomes of a captured connection that leads to no service
	// of the mesh: "refuse", or "gateway" to ask a gateway for a tunnel to its
	// address. Default refuse.
	Unknown string `yaml:"unknown"`
}

// toGateway is the value of CaptureConfig.Unknown that leads out.
const toGateway = "gateway"

// validateCapture reports what does not fit together.
func (c *Config) validateCapture() error {
	errs := []error{c.Capture.Config.Validate()}
	bad := func(field, what string) { errs = append(errs, fmt.Errorf("%s: %s", field, what)) }
	switch c.Capture.Unknown {
	case "", "refuse":
	case toGateway:
		if len(c.Egress.Addresses) == 0 {
			bad("capture.unknown", "leads to a gateway, and egress.addresses names none")
		}
	default:
		bad("capture.unknown", fmt.Sprintf("%q is neither refuse nor gateway", c.Capture.Unknown))
	}
	if !c.Capture.Enabled() {
		if c.Capture.Hold {
			bad("capture.hold", "nobody is to be captured; name users, cgroups or everyone")
		}
		return errors.Join(errs...)
	}
	// The kernel redirects to the loopback address of each family, and from
	// outside to the address of the interface.
	if a := c.Outbound.Listen; a.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) || a.Port() == 0 {
		bad("outbound.listen", `is where captured connections arrive; write "127.0.0.1:15001"`)
	}
	if c.Inbound.Listen != "" {
		if a, err := netip.ParseAddrPort(c.Inbound.Listen); err != nil && !strings.HasPrefix(c.Inbound.Listen, ":") || err == nil && !a.Addr().IsUnspecified() {
			bad("inbound.listen", `is where captured connections arrive, at any address of the machine; write "[::]:15006", and the address for peers as inbound.advertise`)
		}
	}
	return errors.Join(errs...)
}

// rules are those of the configuration on this machine now.
func (c *Config) rules() (*redirect.Rules, error) {
	d := redirect.Doors{Outbound: c.Outbound.Listen.Port(), Names: c.Names.Listen.Port()}
	if c.Inbound.Listen != "" {
		port, err := portOf(c.Inbound.Listen)
		if err != nil {
			return nil, fmt.Errorf("inbound.listen: %w", err)
		}
		d.Inbound, d.App = port, c.Inbound.App.Port()
	}
	r, err := redirect.New(c.Capture.Config, d)
	if err != nil {
		return nil, daemon.Exit(daemon.Failed, err)
	}
	return r, nil
}

// portOf reads the number of a port from host:port.
func portOf(listen string) (uint16, error) {
	a, err := netip.ParseAddrPort("0.0.0.0" + listen[max(0, strings.LastIndexByte(listen, ':')):])
	if err != nil || a.Port() == 0 {
		return 0, fmt.Errorf("%q has no number of a port", listen)
	}
	return a.Port(), nil
}

// captureCommands are "sidecar capture ...".
func captureCommands(stdout io.Writer) func(load func() (*Config, error)) []*cobra.Command {
	return func(load func() (*Config, error)) []*cobra.Command {
		capture := &cobra.Command{
			Use: "capture", Short: "The kernel's rules that bring the workload's connections here", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		}
		command := func(use, short string, run func(*Config) error) *cobra.Command {
			c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
				cfg, err := load()
				if err != nil {
					return err
				}
				return hintCapture(run(cfg))
			}}
			capture.AddCommand(c)
			return c
		}
		var dry bool
		install := command("install", "Put the rules of the configuration into force, or anew", func(c *Config) error { return installRules(c, dry, stdout) })
		install.Flags().BoolVar(&dry, "dry-run", false, "print the rules, change nothing")
		command("show", "Tell what is in force", func(c *Config) error { return showRules(c, stdout) })
		command("remove", "Take the rules away; before the sidecar is uninstalled", func(c *Config) error { return removeRules(c, stdout) })
		command("addresses", "List the virtual addresses of services, as /etc/hosts has them", func(c *Config) error { return listAddresses(c, stdout) })
		return []*cobra.Command{capture}
	}
}

// hintCapture says what to do about the usual failures.
func hintCapture(err error) error {
	switch {
	case errors.Is(err, redirect.ErrDenied):
		return daemon.Hint(daemon.Exit(daemon.Failed, err), "run it as root, or with CAP_NET_ADMIN")
	case errors.Is(err, redirect.ErrHeld):
		return daemon.Hint(daemon.Exit(daemon.Failed, err), "stop the sidecar first")
	}
	return err
}

func installRules(c *Config, dry bool, stdout io.Writer) error {
	r, err := c.rules()
	if err != nil {
		return err
	}
	if dry {
		_, err := fmt.Fprintf(stdout, "%s%s%s", r, r.RoutesText(), r.FramesText())
		return err
	}
	h, err := r.Install()
	if err != nil {
		return err
	}
	defer h.Close()
	if !h.Owned {
		fmt.Fprintf(stdout, "this kernel keeps nobody with CAP_NET_ADMIN off the rules, not even while a sidecar holds them (Linux 6.9 does)\n")
	}
	if !h.Frames() {
		fmt.Fprintf(stdout, "frames that a workload puts together itself are not held: there is no interface, no user is named, or the kernel is older than Linux 5.16\n")
	}
	_, err = fmt.Fprintf(stdout, "table inet %s: in force, %s\n", c.Capture.Table, h.Digest())
	return err
}

func showRules(c *Config, stdout io.Writer) error {
	s, err := redirect.Look(c.Capture.Config)
	if err != nil {
		return err
	}
	if !s.Installed {
		return daemon.Hint(daemon.Exit(daemon.Failed, fmt.Errorf("table inet %s is not there: nobody is captured", c.Capture.Table)), "sidecar capture install --config FILE")
	}
	holder := "nobody; they stay until removed"
	if s.Owned {
		holder = fmt.Sprintf("a running sidecar (netlink port %d)", s.Owner)
	}
	same := "no"
	r, err := c.rules()
	switch {
	case err != nil:
		same = "unknown: " + err.Error()
	case r.Digest() == s.Digest:
		same = "yes"
	}
	routes := "none"
	if len(s.Routes) > 0 {
		routes = strings.Join(s.Routes, ", ")
	}
	_, err = fmt.Fprintf(stdout, "table inet %s\nrules                 %s\nof this configuration %s\nheld by               %s\nvirtual ranges        %s\nrefused packets       %d TCP, %d other\nheld frames           of %d interfaces, %d refused\n",
		c.Capture.Table, s.Digest, same, holder, routes, s.RefusedTCP, s.RefusedOther, s.Frames, s.RefusedFrames)
	if err == nil && same != "yes" {
		return daemon.Hint(daemon.Exit(daemon.Failed, errors.New("the rules in force are not those of the configuration")), "sidecar capture install --config FILE")
	}
	return err
}

func removeRules(c *Config, stdout io.Writer) error {
	removed, err := redirect.Remove(c.Capture.Config)
	if err != nil {
		return err
	}
	said := "removed; nobody is captured"
	if !removed {
		said = "was not there"
	}
	_, err = fmt.Fprintf(stdout, "table inet %s: %s\n", c.Capture.Table, said)
	return err
}

// addressesPath is where the admin socket tells the virtual addresses.
const addressesPath = "/addresses"

// listAddresses asks the running sidecar which addresses stand for what.
func listAddresses(c *Config, stdout io.Writer) error {
	client := daemon.AdminClient(filepath.Join(c.RunDir, "admin.sock"))
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://sidecar" + addressesPath)
	if err != nil {
		return daemon.Exit(daemon.Unreachable, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return daemon.Exit(daemon.Failed, fmt.Errorf("the sidecar answers %s", resp.Status))
	}
	_, err = io.Copy(stdout, resp.Body)
	return err
}

// serveAddresses is the list for the admin socket.
func (s *sidecar) serveAddresses(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	snap := s.agent.Snapshot()
	if snap == nil {
		http.Error(w, "there is no policy yet", http.StatusServiceUnavailable)
		return
	}
	for _, name := range meshNames(snap) {
		if v4, v6, ok := s.addresses.Addresses(name); ok {
			fmt.Fprintf(w, "%s %s\n%s %s\n", v4, name, v6, name)
		}
	}
}

// meshNames are the names of the services in a snapshot.
func meshNames(snap *mesh.Snapshot) []string {
	names := make([]string, len(snap.Services))
	for i, svc := range snap.Services {
		names[i] = fmt.Sprintf("%s.%s", svc.Name, mesh.Domain)
	}
	return names
}

// virtualService tells which service a virtual address stands for.
func (s *sidecar) virtualService(a netip.Addr) (mesh.ServiceName, bool) {
	name, ok := s.addresses.Name(a)
	if !ok {
		return "", false
	}
	service, ok := strings.CutSuffix(name, "."+mesh.Domain)
	return mesh.ServiceName(service), ok
}

// outsideHost tells which host outside an address stands for: a virtual one, or
// one that the workload was told for it.
func (s *sidecar) outsideHost(a netip.Addr) (string, bool) {
	name, ok := s.addresses.Name(a)
	if !ok && s.real != nil {
		return s.real.Host(a)
	}
	return name, ok && !strings.HasSuffix(name, "."+mesh.Domain)
}

// endpointAt says whether an address is that of a service, for this workload.
func (s *sidecar) endpointAt(a netip.Addr) bool {
	snap := s.agent.Snapshot()
	return snap != nil && slices.ContainsFunc(snap.Endpoints, func(e mesh.Endpoint) bool { return e.Address.Addr().Unmap() == a })
}

// captured is how the way out takes connections that were brought here.
func (s *sidecar) captured() *proxy.Captured {
	if !s.virtual {
		return nil
	}
	return &proxy.Captured{Original: capture.OriginalDst, Virtual: s.virtualService, Outside: s.outsideHost, Beyond: s.cfg.Capture.Unknown == toGateway}
}

const (
	readyCapture = "capture"
	// captureEvery is how often users and cgroups are looked up again.
	captureEvery = time.Second
)

// holdRules puts the rules into force, before anything else is opened, and
// keeps them true to users and cgroups until ctx ends. While the process that
// this one takes over from still holds them, they stand as they are.
func (s *sidecar) holdRules(ctx context.Context, g *errgroup.Group) error {
	s.ready.Expect(readyCapture)
	h, err := s.installRules()
	if err != nil && (s.shift.Tie == nil || !errors.Is(err, redirect.ErrHeld)) {
		return hintCapture(err)
	}
	s.ready.Set(readyCapture, nil)
	g.Go(func() error {
		var last error
		for ctx.Err() == nil {
			daemon.Pause(ctx, captureEvery)
			var err error
			if h == nil {
				if h, err = s.installRules(); errors.Is(err, redirect.ErrHeld) {
					continue
				}
			} else {
				err = s.followRules(h)
			}
			if err != nil && (last == nil || err.Error() != last.Error()) {
				s.log.Error("capture rules do not follow the machine; those before stay in force", "err", err)
			}
			last = err
			s.ready.Set(readyCapture, err)
		}
		if h == nil {
			return nil
		}
		return h.Close()
	})
	return nil
}

func (s *sidecar) installRules() (*redirect.Hold, error) {
	r, err := s.cfg.rules()
	if err != nil {
		return nil, err
	}
	h, err := r.Install()
	if err == nil {
		s.log.Info("capture rules in force", "table", s.cfg.Capture.Table, "rules", h.Digest(), "others_kept_off", h.Owned, "frames", h.Frames())
	}
	return h, err
}

// followRules replaces the rules when they mean something else by now.
func (s *sidecar) followRules(h *redirect.Hold) error {
	r, err := s.cfg.rules()
	if err != nil || r.Digest() == h.Digest() {
		return err
	}
	if err := h.Replace(r); err != nil {
		return err
	}
	s.log.Info("capture rules replaced", "table", s.cfg.Capture.Table, "rules", h.Digest())
	return nil
}

// mayIsolate says why the program cannot have a network namespace of its own.
func (c *Config) mayIsolate(run daemon.Run) error {
	switch {
	case len(run.Program) == 0:
		return daemon.Hint(daemon.Exit(daemon.Usage, errors.New("--isolate without a program after --")), "sidecar run --config FILE --isolate -- PROGRAM ARGS")
	case c.Outbound.Listen.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) || c.Outbound.Listen.Port() == 0:
		return daemon.Hint(daemon.Exit(daemon.Usage, errors.New("--isolate without a way out")), `write "127.0.0.1:15001" as outbound.listen`)
	case c.Names.Listen.IsValid() && (c.Names.Listen.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) || c.Names.Listen.Port() == 0):
		return daemon.Hint(daemon.Exit(daemon.Usage, errors.New("--isolate brings questions to 127.0.0.1")), `write "127.0.0.1:15053" as names.listen`)
	case c.Capture.Enabled():
		return daemon.Hint(daemon.Exit(daemon.Usage, errors.New("--isolate with capture: the program is captured in its own namespace already")), "leave one of them out")
	}
	return nil
}

// outbound are the addresses of the way out, the one first to which captured
// connections are brought.
func (c *Config) outbound() []netip.AddrPort {
	out := []netip.AddrPort{c.Outbound.Listen}
	if hasIPv6() {
		out = append(out, twin(c.Outbound.Listen))
	}
	for _, u := range c.Outbound.Upstreams {
		out = append(out, u.Listen)
	}
	return out
}

// twin is the same port on the loopback address of IPv6.
func twin(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.IPv6Loopback(), a.Port())
}

// hasIPv6 says whether the machine has a loopback address of IPv6.
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}
