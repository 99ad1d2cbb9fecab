package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/leak"
)

// egress is "sallyport egress".
func (c *cli) egress() *cobra.Command {
	cmd := &cobra.Command{Use: "egress", Short: "Look at what leaves the mesh, and what must not"}
	cmd.AddCommand(c.egressDenied(), c.egressLedger(), c.egressAllow(), c.egressLeakTest(), c.egressWitness())
	return cmd
}

func (c *cli) egressLeakTest() *cobra.Command {
	var f struct {
		witness, only []string
		users         []int
		timeout       time.Duration
		wait          bool
	}
	cmd := &cobra.Command{
		Use:   "leak-test",
		Short: "Try from inside of a workload every way out past the sidecar",
		Long: `Try from inside of a workload every way out past the sidecar, as somebody would
who has taken it over, and say which of them lead somewhere. Run it as the user
and in the container of the workload, with a witness outside:

  outside$  sallyport egress witness --listen 192.0.2.7:7777
  inside$   sallyport egress leak-test --witness 192.0.2.7:7777 --user 1337

A way that the witness answers has leaked, and so has one without answers that
the kernel has sent. Where nobody answers and nothing has refused, it is not
known. Exit code 1 when any has leaked or is not known. Try it as somebody who
may get out first: a witness that hears nothing proves nothing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf := leak.Config{Users: f.users, Timeout: f.timeout}
			for _, w := range f.witness {
				a, err := netip.ParseAddrPort(w)
				switch {
				case err != nil || a.Port() == 0:
					return usage(fmt.Errorf("--witness: %q is not like 192.0.2.7:7777", w))
				case a.Addr().Is4():
					conf.V4 = a
				default:
					conf.V6 = a
				}
			}
			if len(f.witness) == 0 {
				return usage(errors.New(`--witness: missing; start "sallyport egress witness" outside, and write where it listens`))
			}
			for _, name := range f.only {
				if !strings.Contains(" "+strings.Join(leak.Names(), " ")+" ", " "+name+" ") {
					return usage(fmt.Errorf("--only: there is no way %q; there are %s", name, strings.Join(leak.Names(), ", ")))
				}
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			conf.Self = []string{self, "egress", "leak-test", "--only", "tcp4", "-o", "json", "--wait", "--timeout", f.timeout.String(), "--witness", conf.V4.String()}
			if f.wait {
				if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
					return err
				}
			}
			return c.emitLeaks(leak.Try(cmd.Context(), conf, f.only...))
		},
	}
	cmd.Flags().StringArrayVar(&f.witness, "witness", nil, "host:port of a witness outside; once for each family")
	cmd.Flags().IntSliceVar(&f.users, "user", []int{0}, "number of a user to become, such as the sidecar's")
	cmd.Flags().StringSliceVar(&f.only, "only", nil, "try these ways alone: "+strings.Join(leak.Names(), ", "))
	cmd.Flags().DurationVar(&f.timeout, "timeout", 2*time.Second, "how long to wait for an answer, of each way")
	cmd.Flags().BoolVar(&f.wait, "wait", false, "wait for the end of stdin first")
	_ = cmd.Flags().MarkHidden("wait") // there is one of this name
	return cmd
}

func (c *cli) emitLeaks(r *leak.Report) error {
	var rows [][]string
	for _, o := range r.Ways {
		rows = append(rows, []string{o.Way, string(o.Result), o.Detail})
	}
	if err := c.emit(r, []string{"WAY", "RESULT", "DETAIL"}, rows); err != nil {
		return err
	}
	switch {
	case r.Cases.Tried == 0:
		return failed(errors.New("no way was there to be tried"))
	case !r.OK:
		return failed(fmt.Errorf("%d of %d ways lead out, or may", r.Cases.Failed, r.Cases.Tried))
	}
	return nil
}

func (c *cli) egressWitness() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "witness",
		Short: "Stand outside and answer what a leak-test sends",
		Long: `Stand outside, in TCP and UDP, answer what a leak-test sends, and print whatever
comes. It answers anybody: let it run for the test only.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			at, err := netip.ParseAddrPort(listen)
			if err != nil {
				return usage(fmt.Errorf("--listen: %q is not like 192.0.2.7:7777", listen))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, os.Interrupt)
			defer stop()
			w := &leak.Witness{Heard: func(how string, from netip.AddrPort, line string) {
				fmt.Fprintf(c.stdout, "%s  %s from %s  %s\n", time.Now().Format(time.RFC3339), how, from, strconv.QuoteToASCII(line))
			}}
			err = w.Serve(ctx, at)
			if errors.Is(err, context.Canceled) {
				err = nil
			}
			return err
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "host:port to listen at")
	_ = cmd.MarkFlagRequired("listen") // there is one of this name
	return cmd
}
