package daemon

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// Manual is the command "man" of a program whose pages are in that section of
// the manual: 1 for what people run, 8 for what serves.
func Manual(section int) *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages of all commands into a directory", Args: cobra.ExactArgs(1),
		Long: fmt.Sprintf("Write the manual pages of all commands into a directory, such as\n/usr/local/share/man/man%d: one file for each, named by its words.", section),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return Exit(Failed, err)
			}
			for _, p := range visible(cmd.Root()) {
				if err := WriteFile(filepath.Join(args[0], fmt.Sprintf("%s.%d", pageName(p), section)), page(p, section), 0o644); err != nil {
					return Exit(Failed, err)
				}
			}
			return nil
		},
	}
}

// visible are a command and those below it that people may see.
func visible(cmd *cobra.Command) []*cobra.Command {
	out := []*cobra.Command{cmd}
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" && sub.Name() != "completion" {
			out = append(out, visible(sub)...)
		}
	}
	return out
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// roff writes text so that it means itself.
var roff = strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'")

// page is the manual page of one command, in the macros of man(7).
func page(cmd *cobra.Command, section int) []byte {
	var b bytes.Buffer
	head := func(name string) { fmt.Fprintf(&b, ".SH %s\n", name) }
	name := pageName(cmd)
	fmt.Fprintf(&b, ".TH %q %d \"\" sallyport \"Sallyport Manual\"\n", strings.ToUpper(name), section)
	head("NAME")
	fmt.Fprintf(&b, "%s \\- %s\n", roff.Replace(name), roff.Replace(cmd.Short))
	head("SYNOPSIS")
	fmt.Fprintf(&b, ".nf\n%s\n.fi\n", roff.Replace(cmd.UseLine()))
	if cmd.Long != "" {
		head("DESCRIPTION")
		for i, paragraph := range strings.Split(strings.TrimSpace(cmd.Long), "\n\n") {
			if i > 0 {
				b.WriteString(".PP\n")
			}
			fmt.Fprintln(&b, strings.TrimPrefix(roff.Replace("\n"+paragraph), "\n"))
		}
	}
	options := func(title, usages string) {
		if usages != "" {
			head(title)
			fmt.Fprintf(&b, ".nf\n%s.fi\n", roff.Replace(usages))
		}
	}
	options("OPTIONS", cmd.NonInheritedFlags().FlagUsages())
	options("OPTIONS OF ALL COMMANDS", cmd.InheritedFlags().FlagUsages())
	if cmd.Example != "" {
		head("EXAMPLE")
		fmt.Fprintf(&b, ".nf\n%s\n.fi\n", roff.Replace(cmd.Example))
	}
	head("EXIT STATUS")
	b.WriteString("0 done, or the check passed; 1 it failed, or a check did not pass; 2 a mistake on\nthe command line or in a configuration; 3 nobody answered.\n")
	var also []string
	if cmd.HasParent() {
		also = append(also, pageName(cmd.Parent()))
	}
	for _, sub := range visible(cmd)[1:] {
		if sub.Parent() == cmd {
			also = append(also, pageName(sub))
		}
	}
	if len(also) > 0 {
		head("SEE ALSO")
		for i, a := range also {
			also[i] = ".BR " + roff.Replace(a) + fmt.Sprintf(" (%d)", section)
		}
		b.WriteString(strings.Join(also, ",\n") + "\n")
	}
	return b.Bytes()
}
