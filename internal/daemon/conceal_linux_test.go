package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"sallyport/internal/meshtest"
)

// concealed has the test binary be a process that conceals itself, or one that
// looks at it.
const concealed = "SALLYPORT_TEST_CONCEALED"

func TestConceal(t *testing.T) {
	switch what := os.Getenv(concealed); what {
	case "":
	case "self":
		Conceal()
		for _, f := range []string{"/proc/self/maps", "/proc/self/fdinfo/0", "/proc/self/limits"} {
			if _, err := os.ReadFile(f); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.ReadDir("/proc/self/fd"); err != nil {
			t.Error(err)
		}
		if _, err := os.Readlink("/proc/self/exe"); err != nil {
			t.Error(err)
		}
		look := exec.Command(os.Args[0], "-test.run=^TestConceal$", "-test.v")
		look.Env = append(os.Environ(), fmt.Sprintf("%s=%d", concealed, os.Getpid()))
		if out, err := look.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	default:
		for _, f := range []string{"root/etc", "fd", "environ", "cwd/."} {
			if _, err := os.Open("/proc/" + what + "/" + f); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("%s of it: %v", f, err)
			}
		}
		return
	}
	if os.Getuid() != 0 {
		meshtest.Unable(t, "needs root, to be two processes of a user without privileges")
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "conceal")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(dir+"/conceal", self, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(dir+"/conceal", "-test.run=^TestConceal$", "-test.v")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), concealed+"=self", "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
