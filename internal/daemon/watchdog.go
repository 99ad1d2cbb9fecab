package daemon

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"time"
)

// watchdog tells the service manager that the process is well, as often as it
// asks (WatchdogSec= of systemd), until ctx ends; when it does not ask, it
// returns at once. Well means that the admin socket answers in time. The process
// that takes over from this one is asked the same.
func watchdog(ctx context.Context, socket string, log *slog.Logger) {
	every := WatchdogEvery()
	if every == 0 {
		return
	}
	// It names this process; one that is started by it is not meant by that.
	_ = os.Unsetenv("WATCHDOG_PID")
	c := AdminClient(socket)
	defer c.CloseIdleConnections()
	c.Timeout = every
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := alive(ctx, c); err == nil {
			_ = Notify("WATCHDOG=1")
		} else if ctx.Err() == nil {
			log.Error("the own admin socket does not answer; the service manager is not told that all is well", "err", err)
		}
	}
}

func alive(ctx context.Context, c *http.Client) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin/livez", nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}
